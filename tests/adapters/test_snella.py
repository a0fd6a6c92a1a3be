"""SNELLA: the mixed kernel, and entries that compete across weights on a schedule."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters._importance import cubic_budget
from vision_peft.adapters.snell import SNELL
from vision_peft.adapters.snella import SNELLA, Schedule
from vision_peft.engine.adapter import Clock
from vision_peft.engine.install import attach
from vision_peft.errors import UserError


def kernel(adapter):
    P, Q = adapter.P_out.detach(), adapter.P_in.detach()
    apart = [(P[h][:, None] - Q[h][None]).norm(dim=-1) for h in range(2)]
    D = torch.tensor(0.1, dtype=torch.float64) * apart[0] - torch.tensor(0.1, dtype=torch.float64) * apart[1]
    e = (D / adapter.gamma).exp()
    return (D + adapter.alpha * e / e.sum(0) + adapter.beta).detach()


def survivors(adapter, W):
    return int((delta(adapter, torch.zeros_like(W)) != 0).sum())


class Three(nn.Module):
    """Shapes of the worked example: 54, 72 and 48 entries."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(12, 6), nn.Linear(4, 12)

    def forward(self, x):
        return self.a(x[:, :6]).sum(1) + self.b(x[:, :12]).sum(1) + 1e-2 * self.c(x[:, :4]).sum(1)


def three(**options):
    torch.manual_seed(0)
    network = Three()
    return network, attach(network, SNELLA(**{"rank": 4, "initial_sparsity": 0.1, "sparsity": 0.8, **options}), "all")


def volumes(adapters):
    return [int(each.volume) for each in adapters.adapters.values()]


def run(network, adapters, first, last, clock, optimizer=None, watch=lambda step: None):
    x, target = torch.randn(32, 12, generator=torch.Generator().manual_seed(1)), torch.ones(32)
    optimizer = optimizer or torch.optim.AdamW(adapters.param_groups(0.02), lr=0.02)
    for step in range(first + 1, last + 1):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        optimizer.step()
        adapters.coordinate(clock(step))
        watch(step)
    return optimizer


def test_the_formula():
    W = weight64()
    adapter = moved(SNELLA(rank=6), W)
    adapter.volume.fill_(40)
    K = kernel(adapter)
    w = K.abs().flatten().sort(descending=True).values[40]
    torch.testing.assert_close(delta(adapter, W), K * K.abs() * (K.abs() > w), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("volume", [0, 1, 40, 107])
def test_exactly_the_volume_survives(volume):
    W = weight64()
    adapter = moved(SNELLA(rank=6), W)
    adapter.volume.fill_(volume)
    assert survivors(adapter, W) == volume


def test_the_smallest_entry_falls_even_when_all_may_stay():
    W = weight64()
    adapter = started(SNELLA(rank=6), W)
    assert int(adapter.volume) == 108
    assert survivors(adapter, W) == 107


def test_without_softmax_and_offset_it_is_snell():
    W = weight64()
    ours, snell = moved(SNELLA(rank=6), W), started(SNELL(rank=6, sparsity=0.5), W)
    with torch.no_grad():
        ours.alpha.zero_(), ours.beta.zero_()
        snell.P_in.copy_(ours.P_in), snell.P_out.copy_(ours.P_out)
    ours.volume.fill_(54)
    assert survivors(snell, W) == 54
    torch.testing.assert_close(delta(ours, W), delta(snell, W), rtol=1e-6, atol=1e-12)


def test_an_inputs_softmax_sums_to_alpha():
    W = weight64()
    adapter = moved(SNELLA(rank=6), W)
    sums = []
    with torch.no_grad():
        for alpha in (0.7, 0.0):
            adapter.alpha.fill_(alpha), adapter.beta.fill_(5.0)  # K stays positive, so it is the root of the update
            adapter.volume.fill_(108)
            D = delta(adapter, W)
            smallest = kernel(adapter).min()
            sums.append((D.sqrt() + (D == 0) * smallest).sum(0))
    torch.testing.assert_close(sums[0] - sums[1], torch.full((9,), 0.7, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_the_start_is_small_and_positive():
    """1/m on the average: 1.3e-3 for 768 outputs, and about 2e-6 for an entry of the update."""
    W = torch.zeros(768, 768)
    adapter = started(SNELLA(rank=32), W)
    D = delta(adapter, W)
    assert D.mean().item() == pytest.approx(2e-6, rel=0.3)
    assert D.abs().max() < 3e-5
    assert [p.item() for p in (adapter.alpha, adapter.beta, adapter.gamma)] == [1, 0, 1]


def test_gradients_with_the_second_factor_constant():
    W, G = weight64(), weight64()
    adapter = moved(SNELLA(rank=6), W)
    adapter.volume.fill_(50)
    found = gradients(adapter, W, G)
    K = kernel(adapter)
    gK = G * K.abs() * (K.abs() > K.abs().flatten().sort(descending=True).values[50])
    P, Q, alpha, beta, gamma = leaves = [p.detach().clone().requires_grad_() for p in adapter._tensors()]
    a = torch.tensor(0.1, dtype=torch.float64)
    D = a * (P[0][:, None] - Q[0]).norm(dim=-1) - a * (P[1][:, None] - Q[1]).norm(dim=-1)
    plain = torch.autograd.grad(D + alpha * (D / gamma).softmax(0) + beta, leaves, gK)
    for name, expected in zip(("P_out", "P_in", "alpha", "beta", "gamma"), plain):
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 1e-5, -1e-5])
def test_a_vanishing_gamma_stays_finite_and_can_move(gamma):
    W = torch.randn(12, 9)
    adapter = started(SNELLA(rank=4), W)
    with torch.no_grad():
        adapter.gamma.fill_(gamma)
    found = gradients(adapter, W, torch.randn(12, 9))
    assert all(each.isfinite().all() for each in found.values())
    assert found["gamma"] != 0


def test_rebuilding_the_weight_gives_the_gradients_of_keeping_it():
    W, x, b = weight64(), torch.randn(4, 5, 9, dtype=torch.float64, requires_grad=True), torch.randn(12, dtype=torch.float64)
    adapter = moved(SNELLA(rank=6), W)
    adapter.volume.fill_(50)
    results = []
    for y in (adapter.linear(x, W, b), F.linear(x, adapter.weight(W), b)):
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *adapter.parameters()])])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-11)


def test_volumes_of_the_worked_example_on_epochs():
    """Twelve epochs of three steps; the division for an epoch is in force after its first step."""
    network, adapters = three(warmup=2, final=3)
    seen = {}
    watch = lambda step: seen.setdefault((step - 1) // 3, sum(volumes(adapters)))
    run(network, adapters, 0, 36, lambda step: Clock(step, 36, (step - 1) // 3), watch=watch)
    assert [seen[epoch] for epoch in range(12)] == [157, 157, 157, 111, 79, 57, 44, 37, 35, 34, 34, 34]
    assert int(adapters.shared.steps_an_epoch) == 3


def test_on_steps_the_budget_follows_the_schedule():
    network, adapters = three(tick="step", warmup=4, final=6, interval=2)
    start = volumes(adapters)
    seen = {}
    run(network, adapters, 0, 30, lambda step: Clock(step, 30, 0), watch=lambda step: seen.update({step: volumes(adapters)}))
    assert seen[5] == start == [49, 65, 43]
    for step in range(6, 31):
        counted = step if step > 24 else step - step % 2
        assert sum(seen[step]) == int(cubic_budget(counted, 30, 156.6, 34.8, 4, 6))
    for adapter, layer, volume in zip(adapters.adapters.values(), network.children(), volumes(adapters)):
        assert survivors(adapter, layer.weight) == volume


def test_the_weight_that_matters_keeps_more():
    """The third layer's output counts a hundredth of the others'."""
    network, adapters = three(tick="step")
    run(network, adapters, 0, 30, lambda step: Clock(step, 30, 0))
    a, b, c = volumes(adapters)
    assert c < 0.02 * (a + b)


def test_equal_scores_give_equal_volumes():
    adapters = three(tick="step")[1]
    members = list(adapters.adapters.values())
    for each in members:
        for sensitivity in each.sensitivity.values():
            sensitivity.mean.fill_(2.0), sensitivity.deviation.fill_(0.5)
    adapters.method._divide(members, 30, 30)
    assert volumes(adapters) == [12, 11, 11]


def test_scaled_gradients_divide_alike():
    results = []
    for scale in (1.0, 1000.0):
        adapters = three(tick="step")[1]
        members = list(adapters.adapters.values())
        generator = torch.Generator().manual_seed(2)
        for parameter in adapters.parameters():
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
        for step in range(1, 6):
            adapters.coordinate(Clock(step, 10, 0))
        results.append([int(each.volume) for each in members])
    assert results[0] == results[1]


def test_an_interval_skips_ticks_but_not_the_last_ones():
    network, adapters = three(tick="step", interval=10, final=3)
    changed, before = [], [volumes(adapters)]

    def watch(step):
        if volumes(adapters) != before[-1]:
            changed.append(step)
            before.append(volumes(adapters))

    run(network, adapters, 0, 18, lambda step: Clock(step, 18, 0), watch=watch)
    assert changed[:2] == [10, 16]


def test_a_resumed_run_goes_on_identically():
    clock = lambda step: Clock(step, 40, (step - 1) // 4)
    network, adapters = three()
    optimizer = run(network, adapters, 0, 14, clock)
    held = copy.deepcopy((adapters.state_dict(), optimizer.state_dict()))
    run(network, adapters, 14, 40, clock, optimizer)
    network2, resumed = three()
    resumed.load_state_dict(held[0])
    second = torch.optim.AdamW(resumed.param_groups(0.02), lr=0.02)
    second.load_state_dict(held[1])
    run(network2, resumed, 14, 40, clock, second)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in adapters.state_dict().items())


def test_the_last_epoch_may_be_short():
    """Ten steps in epochs of four are three epochs."""
    schedule = Schedule()
    assert schedule.now("epoch", Clock(4, 10, 0)) == (0, 1)
    assert schedule.now("epoch", Clock(5, 10, 1)) == (1, 3)
    assert schedule.now("epoch", Clock(10, 10, 2)) == (2, 3)


def test_counts():
    """768 x 768 at r = 32: 49,155; a ViT-B's 72 linear layers 5,308,632."""
    assert SNELLA().count(site(768, 768)) == 49_155
    block = 4 * [site(768, 768)] + [site(3072, 768), site(768, 3072)]
    assert 12 * sum(SNELLA().count(each) for each in block) == 5_308_632
    assert trainables(SNELLA(rank=4), site(8, 4, 3, 3)) == SNELLA(rank=4).count(site(8, 4, 3, 3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 5}, "rank: 5 is not a positive even number"),
        ({"sparsity": 1.0}, "sparsity: 1.0"),
        ({"initial_sparsity": 0.5}, "initial_sparsity: 0.5 is not between 0 and sparsity, 0.3"),
        ({"initial_sparsity": -0.1}, "initial_sparsity: -0.1"),
        ({"tick": "batch"}, "tick: 'batch' is not one of epoch, step"),
        ({"warmup": -1}, "warmup: -1 is below 0"),
        ({"final": -1}, "final: -1 is below 0"),
        ({"interval": 0}, "interval: 0 is below 1"),
        ({"beta1": 1.0}, "beta1: 1.0"),
        ({"beta2": 1.0}, "beta2: 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        SNELLA(**options)
