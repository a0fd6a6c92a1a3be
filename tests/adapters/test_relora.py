"""ReLoRA: restarts that change nothing but the rank to come, and moments that are pruned and nothing else."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.relora import ReLoRA
from vision_peft.engine.adapter import Clock
from vision_peft.engine.install import attach
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}
INPUTS = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))


def bare():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 10))


def build(method):
    network = bare()
    return network, attach(network, method, "all")


def train(network, adapters, first, last, optimizer, total=100):
    """Adam steps first + 1 to last on a fixed batch; yields after each."""
    generator = torch.Generator().manual_seed(4)
    x, target = torch.randn(32, 9, generator=generator), torch.randn(32, 10, generator=generator)
    for step in range(first, last):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        optimizer.step()
        adapters.coordinate(Clock(step + 1, total, 0, optimizer))
        yield step + 1


def adam(adapters):
    return torch.optim.Adam(adapters.parameters(), lr=3e-2)


def run(method, steps, total=100):
    network, adapters = build(method)
    optimizer = adam(adapters)
    for _ in train(network, adapters, 0, steps, optimizer, total):
        pass
    return network, adapters, optimizer


def test_starts_at_the_identity_with_the_factors_of_lora():
    W = torch.randn(12, 9)
    adapter = started(ReLoRA(rank=3), W)
    assert torch.equal(adapter.weight(W), W)
    assert torch.equal(adapter.A, started(LoRA(rank=3), W).A)


def test_the_formula():
    W = weight64()
    adapter = moved(ReLoRA(rank=3, alpha=2.0), W)
    adapter.D.normal_()
    torch.testing.assert_close(delta(adapter, W), (adapter.D + 2 / 3 * adapter.B @ adapter.A).detach(), **EXACT)


def test_gradients_are_those_of_lora():
    W, G = weight64(), weight64()
    adapter = moved(ReLoRA(rank=3, alpha=2.0), W)
    adapter.D.normal_()
    found = gradients(adapter, W, G)
    assert set(found) == {"A", "B"}
    torch.testing.assert_close(found["B"], 2 / 3 * G @ adapter.A.mT, **EXACT)
    torch.testing.assert_close(found["A"], 2 / 3 * adapter.B.mT @ G, **EXACT)


def test_a_restart_changes_the_factors_and_not_the_weight():
    W = weight64()
    adapter = moved(ReLoRA(rank=3), W)
    before, A = delta(adapter, W), adapter.A.detach().clone()
    with torch.no_grad():
        adapter.restart()
    torch.testing.assert_close(delta(adapter, W), before, **EXACT)
    torch.testing.assert_close(adapter.D, before, **EXACT)
    assert not adapter.B.any()
    assert (adapter.A - A).abs().min() > 0
    assert 0.9 / 3 < adapter.A.abs().max() <= 1 / 3


def test_every_restart_adds_its_rank():
    W = weight64()
    adapter, ranks = started(ReLoRA(rank=2), W), []
    with torch.no_grad():
        for _ in range(4):
            adapter.B.normal_()
            ranks.append(int(torch.linalg.matrix_rank(delta(adapter, W))))
            adapter.restart()
    assert ranks == [2, 4, 6, 8]


def test_draws_of_restarts_differ_among_themselves_and_follow_the_seed():
    def draws(seed):
        adapter, found = started(ReLoRA(rank=2), torch.randn(12, 9), seed), []
        with torch.no_grad():
            for _ in range(3):
                adapter.restart()
                found.append(adapter.A.detach().clone())
        return found

    one, again, other = draws(0), draws(0), draws(1)
    assert all(torch.equal(*pair) for pair in zip(one, again))
    assert not any(torch.equal(a, b) for a, b in [(one[0], one[1]), (one[1], one[2]), *zip(one, other), (one[1], other[0])])


def test_restarts_come_after_every_t_steps_but_not_after_the_last():
    network, adapters = build(ReLoRA(rank=2, every=2))
    adapter, seen = adapters.adapters["0"], []
    for _ in train(network, adapters, 0, 6, adam(adapters), total=6):
        seen.append((int(adapter.restarts), bool(adapter.B.any())))
    assert seen == [(0, True), (1, False), (1, True), (2, False), (2, True), (2, True)]


def test_before_its_first_restart_it_is_lora():
    network, _, _ = run(ReLoRA(rank=2, every=10), 5)
    other, _, _ = run(LoRA(rank=2), 5)
    torch.testing.assert_close(network(INPUTS), other(INPUTS), rtol=1e-4, atol=1e-5)


def test_the_offset_is_the_weight_that_the_paper_rewrites():
    """Three phases of plain LoRA by SGD, each merged into the weight, from the same draws."""
    network, adapters = build(ReLoRA(rank=2, every=2))
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.5)
    other, phases = bare(), []
    loras = attach(other, LoRA(rank=2), "all")
    copied = torch.optim.SGD(loras.parameters(), lr=0.5)
    steps = train(other, loras, 0, 6, copied)
    for step in train(network, adapters, 0, 6, optimizer):
        next(steps)
        if step % 2 == 0:
            phases.append(step)
            with torch.no_grad():
                for name, lora in loras.adapters.items():
                    weight = other.get_submodule(name).weight
                    weight.copy_(lora.weight(weight))
                    lora.A.copy_(adapters.adapters[name].A), lora.B.zero_()
        torch.testing.assert_close(network(INPUTS), other(INPUTS), rtol=1e-4, atol=1e-5)
    assert phases == [2, 4, 6]


def test_pruning_by_magnitude_keeps_the_largest_first_moments():
    _, adapters, optimizer = run(ReLoRA(rank=2, every=50, prune=0.75), 5)
    adapter = adapters.adapters["0"]
    before = {name: value.clone() for name, value in optimizer.state[adapter.A].items()}
    adapters.coordinate(Clock(50, 100, 0, optimizer))
    state = optimizer.state[adapter.A]
    kept = state["exp_avg"] != 0
    assert int(kept.sum()) == 18 - round(0.75 * 18)
    assert before["exp_avg"][kept].abs().min() >= before["exp_avg"][~kept].abs().max()
    assert torch.equal(state["exp_avg"][kept], before["exp_avg"][kept])
    assert torch.equal(state["exp_avg_sq"], before["exp_avg_sq"] * kept)
    assert torch.equal(state["step"], before["step"])
    assert int((optimizer.state[adapter.B]["exp_avg"] != 0).sum()) == 24 - 18


@pytest.mark.parametrize("pruning", ["magnitude", "random"])
@pytest.mark.parametrize("prune, kept", [(0.0, 18), (0.5, 9), (1.0, 0)])
def test_how_much_is_pruned(pruning, prune, kept):
    _, adapters, optimizer = run(ReLoRA(rank=2, every=50, prune=prune, pruning=pruning), 5)
    adapters.coordinate(Clock(50, 100, 0, optimizer))
    state = optimizer.state[adapters.adapters["0"].A]
    assert int((state["exp_avg"] != 0).sum()) == int((state["exp_avg_sq"] != 0).sum()) == kept


def test_random_pruning_chooses_otherwise_and_the_same_again():
    found = {}
    for key, pruning in {"one": "random", "again": "random", "largest": "magnitude"}.items():
        _, adapters, optimizer = run(ReLoRA(rank=2, every=50, prune=0.5, pruning=pruning), 5)
        adapters.coordinate(Clock(50, 100, 0, optimizer))
        found[key] = optimizer.state[adapters.adapters["0"].A]["exp_avg"] != 0
    assert torch.equal(found["one"], found["again"])
    assert not torch.equal(found["one"], found["largest"])


def test_what_else_is_trained_keeps_its_moments():
    network, adapters = build(ReLoRA(rank=2, every=2, prune=1.0))
    head = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([*adapters.parameters(), head], lr=1e-2)
    (network(INPUTS).square().mean() + head.square().sum()).backward()
    optimizer.step()
    adapters.coordinate(Clock(2, 10, 0, optimizer))
    assert optimizer.state[head]["exp_avg"].all()
    assert not optimizer.state[adapters.adapters["0"].B]["exp_avg"].any()


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD])
def test_optimizers_without_moments(optimizer):
    _, adapters = build(ReLoRA(rank=2, every=1))
    made = optimizer and optimizer(adapters.parameters(), lr=0.1)
    adapters.coordinate(Clock(1, 10, 0, made))
    assert int(adapters.adapters["0"].restarts) == 1


@pytest.mark.parametrize("pruning", ["magnitude", "random"])
def test_a_resumed_run_goes_on_as_an_unbroken_one(pruning):
    method = lambda: ReLoRA(rank=2, every=2, prune=0.5, pruning=pruning)
    whole, _, _ = run(method(), 7)
    _, early, optimizer = run(method(), 3)
    network, late = build(method())
    late.load_state_dict(early.state_dict())
    again = adam(late)
    again.load_state_dict(optimizer.state_dict())
    for _ in train(network, late, 3, 7, again):
        pass
    assert torch.equal(network(INPUTS), whole(INPUTS))


def test_the_folder_holds_the_offset(tmp_path):
    network, adapters, _ = run(ReLoRA(rank=2, every=2), 5)
    save_adapter(tmp_path / "adapter", network)
    fresh = bare()
    loaded = load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(INPUTS), network(INPUTS))
    assert int(loaded.adapters["0"].restarts) == int(adapters.adapters["0"].restarts) == 2
    assert torch.equal(loaded.adapters["0"].seed, adapters.adapters["0"].seed)


def test_counts():
    """12,288 for 768 x 768 at r = 8, as LoRA; the offset is not trained."""
    assert ReLoRA(rank=8).count(site(768, 768)) == 12_288
    assert count(ReLoRA(rank=2), clip_vit_b16()) == 184_320
    assert trainables(ReLoRA(rank=3), site(4, 2, 3, 3)) == ReLoRA(rank=3).count(site(4, 2, 3, 3)) == 66


@pytest.mark.parametrize(
    "options, message",
    [
        ({"every": 0}, "every: 0 is not positive"),
        ({"prune": 1.5}, "prune: 1.5 is not in"),
        ({"prune": -0.1}, "prune: -0.1 is not in"),
        ({"pruning": "all"}, "pruning: 'all' is not one of magnitude, random"),
        ({"rank": 0}, "rank: 0"),
        ({"scaling": "no"}, "scaling: 'no'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        ReLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        ReLoRA(rank=10).adapter(site(12, 9), None)
