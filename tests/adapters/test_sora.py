"""SoRA: the gated product, the proximal step as part of training, thresholds over a run, and the smaller LoRA that is left."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.sora import SoRA
from vision_peft.engine.adapter import Clock
from vision_peft.engine.install import attach
from vision_peft.engine.peft_layout import save_peft
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def shrunk(method: SoRA, gates: list[float], clock: Clock) -> list[float]:
    adapter = started(SoRA(rank=len(gates)), weight64(12, 10))
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor(gates, dtype=torch.float64))
        if clock.optimizer is not None:
            clock.optimizer.add_param_group({"params": [adapter.gate], "lr": 0.5})
        method.coordinate({"a": adapter}, None, clock)
    return adapter.gate.tolist()


def test_starts_at_the_identity_with_gates_of_unit_variance():
    W = torch.randn(12, 9)
    adapter = started(SoRA(rank=9), W)
    assert torch.equal(adapter.weight(W), W)
    assert 0.3 < float(adapter.gate.detach().std()) < 2
    assert not torch.equal(adapter.gate, started(SoRA(rank=9), W, seed=1).gate)
    many = torch.stack([started(SoRA(rank=9), W, seed=seed).gate.detach() for seed in range(200)])
    assert abs(float(many.mean())) < 0.1
    assert abs(float(many.std()) - 1) < 0.05


def test_the_formula_as_a_sum_over_ranks():
    W = weight64()
    adapter = moved(SoRA(rank=3, alpha=12.0), W)
    terms = [4.0 * adapter.gate[k] * torch.outer(adapter.B[:, k], adapter.A[k]) for k in range(3)]
    torch.testing.assert_close(delta(adapter, W), sum(terms).detach(), **EXACT)


def test_gates_of_one_give_lora_and_gates_of_zero_the_frozen_weight():
    W = weight64()
    ours, lora = moved(SoRA(rank=3), W), moved(LoRA(rank=3, alpha=16.0), W)
    with torch.no_grad():
        lora.A.copy_(ours.A), lora.B.copy_(ours.B), ours.gate.fill_(1.0)
        torch.testing.assert_close(ours.weight(W), lora.weight(W), **EXACT)
        ours.gate.zero_()
    assert torch.equal(ours.weight(W), W)


def test_permuting_the_ranks_changes_nothing():
    W = weight64()
    adapter = moved(SoRA(rank=4), W)
    before, order = delta(adapter, W), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        adapter.A.copy_(adapter.A[order]), adapter.B.copy_(adapter.B[:, order]), adapter.gate.copy_(adapter.gate[order])
    torch.testing.assert_close(delta(adapter, W), before, **EXACT)


def test_a_dead_gate_still_gets_a_gradient_and_its_rank_none():
    W, G = weight64(), weight64()
    adapter = moved(SoRA(rank=3, alpha=6.0), W)
    with torch.no_grad():
        adapter.gate[1] = 0.0
    found = gradients(adapter, W, G)
    by_hand = torch.stack([2 * adapter.B[:, k] @ G @ adapter.A[k] for k in range(3)]).detach()
    torch.testing.assert_close(found["gate"], by_hand, **EXACT)
    assert found["gate"][1] != 0
    assert not found["A"][1].any() and not found["B"][:, 1].any()


@pytest.mark.parametrize("prox, expected", [("paper", [0.2, 0.05, 0, 0, -0.15]), ("official", [0.2, 0, 0.1, 0, -0.15])])
def test_the_step_of_the_gates(prox, expected):
    found = shrunk(SoRA(xi=0.1, prox=prox), [0.3, 0.15, 0.1, -0.05, -0.25], Clock(3, 10, 0))
    assert found == pytest.approx(expected, abs=1e-7)


def test_the_step_scaled_by_the_learning_rate_of_the_gates():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=7.0)
    assert shrunk(SoRA(xi=0.1, xi_scale="lr"), [0.3, -0.04], Clock(3, 10, 0, optimizer)) == pytest.approx([0.25, 0])


def test_a_gate_without_gradient_dies_after_its_size_over_xi_steps():
    method, adapter = SoRA(rank=2, xi=0.03), started(SoRA(rank=2), weight64())
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor([0.1, -1.0]))
        sizes = []
        for step in range(4):
            method.coordinate({"a": adapter}, None, Clock(step + 1, 100, 0))
            sizes.append(adapter.gate.abs().tolist())
    assert [size[0] for size in sizes] == pytest.approx([0.07, 0.04, 0.01, 0])
    assert sizes[3][1] == pytest.approx(0.88)


def test_in_training_the_threshold_prunes_and_a_higher_one_prunes_more():
    """Real steps: gates end at exactly zero, and ranks left fall as xi rises; without it none is zero."""
    left = []
    for xi in (0.0, 0.02, 0.05):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 8))
        adapters = attach(network, SoRA(rank=8, xi=xi), "all")
        optimizer = torch.optim.AdamW(adapters.param_groups(1e-2), lr=1e-2)
        x, target = torch.randn(32, 9), torch.randn(32, 8)
        for step in range(40):
            optimizer.zero_grad()
            (network(x) - target).square().mean().backward()
            optimizer.step()
            adapters.coordinate(Clock(step + 1, 40, 0, optimizer))
        left.append(sum(int(each.gate.count_nonzero()) for each in adapters.adapters.values()))
    assert left[0] == 16 > left[1] > left[2]


def test_gates_have_a_group_without_decay():
    adapters = attach(nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 8)), SoRA(rank=2), "all")
    factors, gates = adapters.param_groups(1e-3)
    assert gates["weight_decay"] == 0.0 and [p.shape for p in gates["params"]] == [(2,), (2,)]
    assert {id(p) for group in (factors, gates) for p in group["params"]} == {id(p) for p in adapters.parameters()}
    assert len(factors["params"]) == 4
    assert "lr" not in gates
    method = SoRA(rank=2, gate_lr=0.5)
    assert [group.get("lr") for group in method.param_groups(adapters.named_adapters(), None, 1e-3)] == [None, 0.5]


def test_the_pruned_adapter_is_a_smaller_lora_and_equal():
    W = weight64()
    adapter = moved(SoRA(rank=5, alpha=10.0), W)
    with torch.no_grad():
        adapter.gate[[0, 3]] = 0.0
    small = adapter.compact()
    assert (small.B.shape, small.A.shape) == ((12, 3), (3, 9))
    assert small.scale == adapter.scale == 2.0  # alpha' / r' = alpha / r_max
    torch.testing.assert_close(delta(small, W), delta(adapter, W), **EXACT)


def test_a_layer_without_ranks_left_is_the_frozen_one():
    W = weight64()
    adapter = moved(SoRA(rank=3), W)
    with torch.no_grad():
        adapter.gate.zero_()
    small = adapter.compact()
    assert small.A.shape == (0, 9)
    assert torch.equal(small.weight(W), W)


def test_a_peft_export_holds_the_ranks_that_are_left(tmp_path):
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 8))
    bare = copy.deepcopy(network)
    adapters = attach(network, SoRA(rank=4), "all")
    with torch.no_grad():
        for adapter in adapters.adapters.values():
            adapter.B.normal_()
        adapters.adapters["0"].gate[:3] = 0.0
        adapters.adapters["2"].gate.zero_()
    save_peft(tmp_path / "peft", network, base_model="none")
    layers = peft.PeftModel.from_pretrained(bare, tmp_path / "peft").base_model.model
    assert [layers[index].lora_A["default"].weight.shape[0] for index in (0, 2)] == [1, 1]  # PEFT has no rank 0
    x = torch.randn(5, 9)
    torch.testing.assert_close(layers(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "spacing, low, expected",
    [
        ("linear", 0.0, [0.0, 0.3, 0.6]),
        ("log_linear", 0.0, [0.0, math.log((1 + math.exp(0.6)) / 2), 0.6]),
        ("exp_linear", 0.006, [0.006, 0.06, 0.6]),
    ],
)
def test_thresholds_over_a_run(spacing, low, expected):
    """100 steps, the first phase takes 40, the two others 30 each."""
    method = SoRA(xi=0.6, xi_min=low, phases=3, spacing=spacing, first_phase=0.4)
    found = [method.threshold(step, 100) for step in range(1, 101)]
    assert found == pytest.approx([value for value, length in zip(expected, (40, 30, 30)) for _ in range(length)])


def test_the_schedule_of_the_paper():
    """Seven values to 7e-4: 50 epochs of the first, 15 of each other."""
    method = SoRA(xi=7e-4, phases=7)
    found = [method.threshold(epoch, 140) for epoch in range(1, 141)]
    assert [found.index(value) for value in sorted(set(found))] == [0, 50, 65, 80, 95, 110, 125]
    assert sorted(set(found)) == pytest.approx([0, 7e-4 / 6, 14e-4 / 6, 21e-4 / 6, 28e-4 / 6, 35e-4 / 6, 7e-4])


def test_the_phase_reaches_the_gates():
    method = SoRA(xi=0.2, phases=2, first_phase=0.5)
    assert shrunk(method, [0.3], Clock(5, 10, 0)) == pytest.approx([0.3])
    assert shrunk(method, [0.3], Clock(6, 10, 0)) == pytest.approx([0.1])


def test_the_penalty_is_the_mean_of_all_gates():
    adapters = attach(nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 8)), SoRA(rank=3, l1=10.0), "all")
    gates = torch.cat([each.gate for each in adapters.adapters.values()])
    torch.testing.assert_close(adapters.penalty(), 10 * gates.abs().mean())
    assert attach(nn.Sequential(nn.Linear(9, 12)), SoRA(rank=3), "all").penalty() == 0


def test_a_run_too_short_for_pruning_is_warned():
    with pytest.warns(UserWarning, match="60 steps shrink a gate by 1.8e-02"):
        shrunk(SoRA(), [1.0], Clock(1, 60, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shrunk(SoRA(), [1.0], Clock(1, 3600, 0))
        shrunk(SoRA(), [1.0], Clock(2, 60, 0))


def test_counts():
    """768 x 768, r = 8: 12,296, and 7,680 with 5 ranks left; ViT-B/16, six matrices a block: 1,327,104 and 576 gates."""
    assert SoRA().count(site(768, 768)) == 12_296
    block = [site(768, 768)] * 4 + [site(3072, 768), site(768, 3072)]
    assert 12 * sum(SoRA().count(each) for each in block) == 1_327_104 + 576
    assert trainables(SoRA(rank=3), site(4, 2, 3, 3)) == SoRA(rank=3).count(site(4, 2, 3, 3))
    adapter = started(SoRA(), torch.zeros(768, 768))
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor([1.0, 0, 2, 0, 3, 0, 4, 5]))
    assert sum(p.numel() for p in adapter.compact().parameters()) == 7_680


@pytest.mark.parametrize(
    "options, message",
    [
        ({"xi": -1e-4}, "method.xi: -0.0001 is negative"),
        ({"gate_lr": 0.0}, "gate_lr: 0.0 is not positive"),
        ({"xi_scale": "step"}, "xi_scale: 'step' is not one of const, lr"),
        ({"prox": "hard"}, "prox: 'hard' is not one of paper, official"),
        ({"l1": -1.0}, "l1: -1.0 is negative"),
        ({"phases": 0}, "phases: 0"),
        ({"phases": 2, "xi_min": 1.0}, "xi_min: 1.0 is not in"),
        ({"phases": 2, "spacing": "exp_linear"}, "xi_min: spacing exp_linear needs a positive one"),
        ({"spacing": "cubic"}, "spacing: 'cubic'"),
        ({"first_phase": 1.0}, "first_phase: 1.0"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"rank": 0}, "rank: 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        SoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        SoRA(rank=10).adapter(site(12, 9), None)
