"""AdaLoRA: triplets, their scores, and a budget that ends where it should."""

from __future__ import annotations

import copy

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters._importance import cubic_budget
from vision_peft.adapters.adalora import AdaLoRA
from vision_peft.engine.adapter import Clock
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

OPTIONS = {"rank": 2, "initial_rank": 4, "warmup": 0.1, "final": 0.5, "interval": 2}


def run(network, adapters, steps, total, optimizer=None, first=0, watch=lambda step: None):
    """Regression onto the output of the two layers with a change of rank 3 in the first."""
    generator = torch.Generator().manual_seed(1)
    x, left, right = (torch.randn(*shape, generator=generator) for shape in ((64, 8), (8, 3), (3, 8)))
    with torch.no_grad():
        target = x @ (network[0].weight + left @ right).mT @ network[1].weight.mT
    optimizer = optimizer or torch.optim.AdamW(adapters.param_groups(0.02), lr=0.02, weight_decay=0.0)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = (network(x) - target).square().mean() + adapters.penalty()
        loss.backward()
        adapters.adjust_gradients(Clock(step, total, 0, optimizer))
        optimizer.step()
        adapters.coordinate(Clock(step + 1, total, 0, optimizer))
        watch(step + 1)
    return optimizer


def two_layers(**options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    return network, attach(network, AdaLoRA(**OPTIONS | options), "all")


def alive(adapters):
    return [int((each.e != 0).sum()) for each in adapters.adapters.values()]


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    adapter = started(AdaLoRA(rank=2), W)
    assert torch.equal(adapter.weight(W), W)
    assert 0.01 < adapter.A.std() < 0.03
    assert 0.01 < adapter.B.std() < 0.03


def test_the_formula():
    """The divisor is r_0."""
    W = weight64()
    adapter = moved(AdaLoRA(rank=2, initial_rank=5, alpha=3.0), W)
    expected = sum(3 / 5 * adapter.e[k] * torch.outer(adapter.B[:, k], adapter.A[k]) for k in range(5))
    torch.testing.assert_close(delta(adapter, W), expected.detach(), rtol=1e-11, atol=1e-12)


def test_gradient_of_the_middle_factor():
    W, G = weight64(), weight64()
    adapter = moved(AdaLoRA(rank=2, initial_rank=3, alpha=3.0), W)
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["e"], torch.diag(adapter.B.mT @ G @ adapter.A.mT).detach(), rtol=1e-10, atol=1e-12)


def test_the_penalty_is_half_the_mean_over_all_factors():
    adapters = two_layers()[1]
    norms = []
    for each in adapters.adapters.values():
        norms += [torch.linalg.norm(each.A @ each.A.mT - torch.eye(4)), torch.linalg.norm(each.B.mT @ each.B - torch.eye(4))]
    torch.testing.assert_close(adapters.penalty(), 0.5 * sum(norms) / 4)
    assert two_layers(orthogonality=0.0)[1].penalty() == 0


def test_the_penalty_pulls_towards_orthogonal_rows():
    def distance(adapters):
        return sum((a.A @ a.A.mT - torch.eye(4)).norm().item() for a in adapters.adapters.values())

    ends = []
    for weight in (0.0, 5.0):
        network, adapters = two_layers(orthogonality=weight)
        run(network, adapters, 80, 80)
        ends.append(distance(adapters))
    assert ends[1] < 0.2 * ends[0]


def test_the_score_of_a_triplet():
    adapter = started(AdaLoRA(rank=2, initial_rank=3), torch.randn(5, 4))
    for each in adapter.sensitivity.values():
        each.mean.uniform_(), each.deviation.uniform_()
    S = {name: (each.mean * each.deviation).double() for name, each in adapter.sensitivity.items()}
    expected = [S["e"][k] + S["A"][k].sum() / 4 + S["B"][:, k].sum() / 5 for k in range(3)]
    torch.testing.assert_close(adapter.scores().double(), torch.stack(expected))


def test_the_budget_is_met_all_the_way():
    """Eight triplets, four at the end; masks at even steps between 4 and 20, then for good."""
    network, adapters = two_layers()

    def watch(step):
        kept = sum(int(each.kept.sum()) for each in adapters.adapters.values())
        if step < 6:  # warmed up until 4; masks fall on even steps
            assert kept == 8
        elif step < 20:
            assert kept == cubic_budget(step - step % 2, 40, 8, 4, 4, 20)
        else:
            assert kept == sum(alive(adapters)) == 4

    run(network, adapters, 40, 40, watch=watch)


def test_the_layer_that_matters_keeps_more():
    """The second layer sees a hundredth of the input, so next to nothing can be gained there."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"useful": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    adapters = attach(network, AdaLoRA(**OPTIONS), "all")
    x, target = torch.randn(64, 8), torch.randn(64, 8)
    optimizer = torch.optim.AdamW(adapters.param_groups(0.02), lr=0.02, weight_decay=0.0)
    for step in range(40):
        optimizer.zero_grad()
        ((network["useful"](x) + network["idle"](0.01 * x) - target).square().mean()).backward()
        optimizer.step()
        adapters.coordinate(Clock(step + 1, 40, 0, optimizer))
    assert alive(adapters) == [4, 0]


def test_a_pruned_triplet_may_come_back_until_the_last_part_only():
    network, adapters = two_layers(interval=4)
    seen = {}

    def watch(step):
        seen[step] = [(each.kept.clone(), each.e.clone()) for each in adapters.adapters.values()]

    run(network, adapters, 40, 40, watch=watch)
    assert all((e[~kept] == 0).all() for kept, e in seen[16])
    assert any((e[~kept] != 0).any() for kept, e in seen[17])  # grows again between two allocations
    assert all((e[~kept] == 0).all() for step in range(20, 41) for kept, e in seen[step])
    assert all(torch.equal(seen[20][i][0], seen[40][i][0]) for i in range(2))  # the mask holds


def test_nothing_is_resized_and_an_export_leaves_out_what_is_zero():
    network, adapters = two_layers()
    shapes = [p.shape for p in adapters.parameters()]
    run(network, adapters, 40, 40)
    assert [p.shape for p in adapters.parameters()] == shapes
    for layer, adapter in zip(network, adapters.adapters.values()):
        W, small = layer.weight.detach(), adapter.compact()
        assert len(small.e) == int((adapter.e != 0).sum())
        torch.testing.assert_close(small.weight(W), adapter.weight(W))
        assert len(adapter.e) == 4


def test_a_resumed_run_goes_on_identically():
    network, adapters = two_layers()
    optimizer = run(network, adapters, 13, 40)
    held = copy.deepcopy((adapters.state_dict(), optimizer.state_dict()))
    run(network, adapters, 27, 40, optimizer, first=13)
    network2, resumed = two_layers()
    resumed.load_state_dict(held[0])
    second = torch.optim.AdamW(resumed.param_groups(0.02), lr=0.02, weight_decay=0.0)
    second.load_state_dict(held[1])
    run(network2, resumed, 27, 40, second, first=13)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in adapters.state_dict().items())


def test_a_run_shorter_than_an_interval_keeps_all():
    network, adapters = two_layers(interval=5)
    run(network, adapters, 4, 4)
    assert alive(adapters) == [4, 4]


def test_importance_stands_still_once_the_mask_is_fixed():
    network, adapters = two_layers()
    optimizer = run(network, adapters, 20, 40)
    before = [each.clone() for name, each in adapters.named_buffers() if "sensitivity" in name]
    run(network, adapters, 5, 40, optimizer, first=20)
    after = [each for name, each in adapters.named_buffers() if "sensitivity" in name]
    assert before
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_against_the_layer_and_the_allocator_of_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5))
    network, twin = copy.deepcopy(plain), copy.deepcopy(plain)
    options = {"rank": 2, "initial_rank": 3, "alpha": 4.0, "warmup": 0.0, "final": 0.3, "interval": 1, "orthogonality": 0.0}
    adapters = attach(network, AdaLoRA(**options), "all")
    config = peft.AdaLoraConfig(
        target_modules=["0", "1"], init_r=3, target_r=2, lora_alpha=4, tinit=0, tfinal=3, deltaT=1, total_step=10, orth_reg_weight=1e-30
    )
    theirs = peft.get_peft_model(twin, config)
    layers = [theirs.base_model.model[i] for i in range(2)]
    for layer, adapter in zip(layers, adapters.adapters.values()):
        layer.lora_A["default"].data.copy_(adapter.A.data)
        layer.lora_B["default"].data.copy_(adapter.B.data)
    x, target = torch.randn(16, 7), torch.randn(16, 5)
    assert torch.equal(theirs(x), network(x))
    ours = torch.optim.AdamW(adapters.param_groups(0.05), lr=0.05, weight_decay=0.0)
    other = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    for step in range(1, 11):
        for net, optimizer in ((network, ours), (theirs, other)):
            optimizer.zero_grad()
            (net(x) - target).square().mean().backward()
            optimizer.step()
        adapters.coordinate(Clock(step, 10, 0, ours))
        theirs.base_model.update_and_allocate(step)
        for layer, adapter in zip(layers, adapters.adapters.values()):  # peft adds 1e-5 to the divisor: equal to about that much
            torch.testing.assert_close(adapter.e, layer.lora_E["default"].flatten(), rtol=1e-3, atol=1e-4)
            assert torch.equal(adapter.e != 0, layer.lora_E["default"].flatten() != 0), step
    assert sum(alive(adapters)) == 4


def test_counts():
    """768 x 768 with 12 triplets: 12 * 1537."""
    assert AdaLoRA().count(site(768, 768)) == 18_444
    assert AdaLoRA(rank=3).start_rank == 5
    for shape in ((12, 9), (8, 4, 3, 3)):
        assert trainables(AdaLoRA(rank=3), site(*shape)) == AdaLoRA(rank=3).count(site(*shape))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: 0 is not positive"),
        ({"rank": 8, "initial_rank": 6}, "initial_rank: 6 is below rank, 8"),
        ({"warmup": -0.1}, "warmup: -0.1 is negative"),
        ({"warmup": 0.5, "final": 0.5}, "final: 0.5 and warmup, 0.5, leave no part"),
        ({"final": -1}, "final: -1"),
        ({"interval": 0}, "interval: 0 is not positive"),
        ({"beta1": 1.0}, "beta1: 1.0"),
        ({"beta2": 0.0}, "beta2: 0.0"),
        ({"orthogonality": -1.0}, "orthogonality: -1.0"),
        ({"dropout": 1.0}, "dropout: 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        AdaLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 12 does not fit"):
        AdaLoRA().adapter(site(12, 9), None)
