"""Delta-LoRA: the telescoped offset against the paper's rule, which rewrites the weight after every step."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.delta_lora import DeltaLoRA
from vision_peft.adapters.lora import LoRA
from vision_peft.engine.adapter import Clock
from vision_peft.engine.install import attach
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def train(network, adapters, steps, first=0, optimizer=None):
    """Adam steps on a fixed batch; yields after each."""
    generator = torch.Generator().manual_seed(4)
    x, target = torch.randn(32, 9, generator=generator), torch.randn(32, 4, generator=generator)
    optimizer = optimizer or torch.optim.Adam(adapters.parameters(), lr=3e-2)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        optimizer.step()
        adapters.coordinate(Clock(step + 1, 100, 0, optimizer))
        yield step + 1


def build(method):
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    return network, attach(network, method, "all")


def begun(method, W):
    """Trained a little, begun, and trained on."""
    adapter = moved(method, W)
    with torch.no_grad():
        adapter.begin()
        adapter.A.add_(torch.randn_like(adapter.A))
        adapter.B.add_(torch.randn_like(adapter.B))
    return adapter


def test_starts_at_the_identity_with_the_factors_of_lora():
    W = torch.randn(12, 9)
    adapter = started(DeltaLoRA(rank=3), W)
    assert torch.equal(adapter.weight(W), W)
    assert torch.equal(adapter.A, started(LoRA(rank=3), W).A)


def test_before_its_start_it_is_lora():
    W = weight64()
    adapter = moved(DeltaLoRA(rank=3, alpha=2.0), W)
    torch.testing.assert_close(delta(adapter, W), 2 / 3 * (adapter.B @ adapter.A).detach(), **EXACT)


def test_the_formula_after_its_start():
    W = weight64()
    adapter = begun(DeltaLoRA(rank=3, alpha=2.0, rho=0.7), W)
    now, then = (adapter.B @ adapter.A).detach(), adapter.B_start @ adapter.A_start
    torch.testing.assert_close(delta(adapter, W), 2 / 3 * (now + 0.7 * (now - then)), **EXACT)
    assert torch.linalg.matrix_rank(delta(adapter, W)) == 6


def test_gradients_are_those_of_the_branch_alone():
    W, G = weight64(), weight64()
    adapter = begun(DeltaLoRA(rank=3, alpha=2.0, rho=5.0), W)
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], 2 / 3 * G @ adapter.A.mT, **EXACT)
    torch.testing.assert_close(found["A"], 2 / 3 * adapter.B.mT @ G, **EXACT)


@pytest.mark.parametrize("start", [0, 3])
def test_the_offset_is_the_weight_that_the_paper_rewrites(start):
    """The rule, literally, beside ours: W_0 of every layer takes rho s times each change, and the branch reads it as a constant."""
    rho, rank, s = 2.0, 2, 4 / 2
    network, adapters = build(DeltaLoRA(rank=rank, alpha=4.0, rho=rho, start=start))
    W = [network[i].weight.detach().clone() for i in (0, 2)]
    b = [network[i].bias.detach() for i in (0, 2)]
    factors = [[adapters.adapters[name].A.detach().clone(), adapters.adapters[name].B.detach().clone()] for name in ("0", "2")]
    for pair in factors:
        for factor in pair:
            factor.requires_grad_()
    optimizer = torch.optim.Adam([factor for pair in factors for factor in pair], lr=3e-2)
    generator = torch.Generator().manual_seed(4)
    x, target = torch.randn(32, 9, generator=generator), torch.randn(32, 4, generator=generator)
    for step in train(network, adapters, 8):
        optimizer.zero_grad()
        h = torch.nn.functional.gelu(x @ (W[0] + s * factors[0][1] @ factors[0][0]).mT + b[0])
        (h @ (W[1] + s * factors[1][1] @ factors[1][0]).mT + b[1] - target).square().mean().backward()
        before = [(B @ A).detach() for A, B in factors]
        optimizer.step()
        if step > start:
            for i, (A, B) in enumerate(factors):
                W[i] += rho * s * ((B @ A).detach() - before[i])
        for i, name in enumerate(("0", "2")):
            A, B = factors[i]
            ours = adapters.adapters[name].weight(network[2 * i].weight)
            torch.testing.assert_close(ours, W[i] + s * B @ A, rtol=1e-3, atol=1e-4)
    assert (W[0] - network[0].weight).abs().max() > 0.05


def test_it_begins_after_the_named_step_and_not_again():
    network, adapters = build(DeltaLoRA(rank=2, start=2))
    adapter, seen = adapters.adapters["0"], []
    for _ in train(network, adapters, 4):
        seen.append((bool(adapter.begun), adapter.B_start.clone()))
    assert [on for on, _ in seen] == [False, True, True, True]
    assert seen[1][1].any()
    assert torch.equal(seen[1][1], seen[3][1])


def test_beginning_does_not_move_the_weight():
    W = weight64()
    adapter = moved(DeltaLoRA(rank=3), W)
    before = delta(adapter, W)
    with torch.no_grad():
        adapter.begin()
    torch.testing.assert_close(delta(adapter, W), before, **EXACT)


def test_rho_zero_is_lora_all_the_way():
    results = []
    for method in (DeltaLoRA(rank=2, rho=0.0, start=1), LoRA(rank=2)):
        network, adapters = build(method)
        for _ in train(network, adapters, 5):
            pass
        results.append(network(torch.ones(2, 9)).detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_it_goes_on_from_a_state_dict():
    whole, adapters = build(DeltaLoRA(rank=2, start=2))
    for _ in train(whole, adapters, 6):
        pass
    first, early = build(DeltaLoRA(rank=2, start=2))
    optimizer = torch.optim.Adam(early.parameters(), lr=3e-2)
    for _ in train(first, early, 3, optimizer=optimizer):
        pass
    second, late = build(DeltaLoRA(rank=2, start=2))
    late.load_state_dict(early.state_dict())
    again = torch.optim.Adam(late.parameters(), lr=3e-2)
    again.load_state_dict(optimizer.state_dict())
    for _ in train(second, late, 3, first=3, optimizer=again):
        pass
    assert torch.equal(second(torch.ones(2, 9)), whole(torch.ones(2, 9)))


def test_the_folder_holds_the_snapshot(tmp_path):
    network, adapters = build(DeltaLoRA(rank=2, start=1))
    for _ in train(network, adapters, 4):
        pass
    save_adapter(tmp_path / "adapter", network)
    torch.manual_seed(2)
    bare = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    load_adapter(bare, tmp_path / "adapter")
    assert torch.equal(bare(torch.ones(2, 9)), network(torch.ones(2, 9)))


def test_counts():
    """As LoRA: 12,288 for 768 x 768 at r = 8; the snapshot is saved but not trained."""
    assert DeltaLoRA(rank=8).count(site(768, 768)) == 12_288
    assert count(DeltaLoRA(rank=2), clip_vit_b16()) == 184_320
    assert trainables(DeltaLoRA(rank=3), site(4, 2, 3, 3)) == DeltaLoRA(rank=3).count(site(4, 2, 3, 3)) == 66
    assert set(started(DeltaLoRA(), weight64()).state_dict()) == {"A", "B", "begun", "A_start", "B_start"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rho": -0.1}, "rho: -0.1 is negative"),
        ({"start": -1}, "start: -1 is negative"),
        ({"rank": 0}, "rank: 0"),
        ({"scaling": "no"}, "scaling: 'no'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        DeltaLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        DeltaLoRA(rank=10).adapter(site(12, 9), None)
