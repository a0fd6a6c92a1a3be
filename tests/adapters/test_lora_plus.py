"""LoRA+: LoRA's map, two rates, and what a schedule and Adam make of them."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.lora_plus import LoRAPlus
from vision_peft.engine.install import attach
from vision_peft.errors import UserError


def two_layers(method):
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    return network, attach(network, method, "all")


def test_starts_at_the_identity_with_the_factors_of_lora():
    W = torch.randn(12, 9)
    adapter = started(LoRAPlus(rank=3), W)
    assert torch.equal(adapter.weight(W), W)
    assert torch.equal(adapter.A, started(LoRA(rank=3), W).A)


@pytest.mark.parametrize("scaling, s", [("rank", 2 / 3), ("sqrt_rank", 2 / 3**0.5)])
def test_the_formula(scaling, s):
    W = weight64()
    adapter = moved(LoRAPlus(rank=3, alpha=2.0, scaling=scaling), W)
    torch.testing.assert_close(delta(adapter, W), s * (adapter.B @ adapter.A).detach(), rtol=0, atol=1e-12)


def test_every_trained_tensor_is_in_one_group_at_its_rate():
    _, adapters = two_layers(LoRAPlus(rank=2, ratio=5.0))
    slow, fast = adapters.param_groups(1e-3)
    assert (slow["name"], slow["lr"], fast["name"], fast["lr"]) == ("A", 1e-3, "B", pytest.approx(5e-3))
    named = {id(p): name for name, p in adapters.named_parameters()}
    assert {named[id(p)] for p in slow["params"]} == {"adapters.0.A", "adapters.2.A"}
    assert {named[id(p)] for p in fast["params"]} == {"adapters.0.B", "adapters.2.B"}


def test_one_adam_step_moves_b_sixteen_times_as_far_as_a():
    network, adapters = two_layers(LoRAPlus(rank=2))
    with torch.no_grad():
        for adapter in adapters.adapters.values():
            adapter.B.normal_()  # at the start A has no gradient
    before = {name: p.detach().clone() for name, p in adapters.named_parameters()}
    optimizer = torch.optim.Adam(adapters.param_groups(1e-3))
    network(torch.randn(16, 9)).square().sum().backward()
    optimizer.step()
    steps = {name: float((p.detach() - before[name]).abs().median()) for name, p in adapters.named_parameters()}
    assert steps["adapters.0.A"] == pytest.approx(1e-3, rel=1e-2)
    assert steps["adapters.0.B"] == pytest.approx(16e-3, rel=1e-2)


def test_the_first_step_moves_the_weight_by_the_ratio():
    """B = 0: what the weight gets is s (dB) A, with dB = -ratio lr sign(s G A^T)."""
    W, G = weight64(), weight64()
    moves = {}
    for ratio in (1.0, 4.0):
        method = LoRAPlus(rank=3, ratio=ratio)
        adapter = started(method, W)
        optimizer = torch.optim.Adam(method.param_groups({"one": adapter}, None, 1e-3), eps=0.0)
        gradients(adapter, W, G)
        adapter.A.grad = None  # zero at this step, and 0 / 0 without eps
        optimizer.step()
        moves[ratio] = delta(adapter, W)
    expected = -4e-3 * adapter.scale * torch.sign(G @ adapter.A.mT) @ adapter.A
    torch.testing.assert_close(moves[4.0], expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(moves[4.0], 4 * moves[1.0], rtol=1e-9, atol=1e-12)


def test_a_schedule_keeps_the_ratio():
    _, adapters = two_layers(LoRAPlus(rank=2, ratio=3.0))
    optimizer = torch.optim.AdamW(adapters.param_groups(1e-3), lr=1e-3)
    scheduler = LinearLR(optimizer, start_factor=0.1, total_iters=4)
    rates = []
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates[0][0] < rates[-1][0]
    assert all(fast == pytest.approx(3 * slow) for slow, fast in rates)


def test_ratio_one_is_lora_step_for_step():
    x, target = torch.randn(16, 9), torch.randn(16, 4)
    results = []
    for method in (LoRAPlus(rank=2, ratio=1.0), LoRA(rank=2)):
        torch.manual_seed(0)
        network, adapters = two_layers(method)
        optimizer = torch.optim.AdamW(adapters.param_groups(1e-2), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            (network(x) - target).square().mean().backward()
            optimizer.step()
        results.append(network(x).detach())
    assert torch.equal(*results)


def test_counts():
    """As LoRA: 12,288 for 768 x 768 at r = 8."""
    assert LoRAPlus(rank=8).count(site(768, 768)) == 12_288
    assert count(LoRAPlus(rank=2), clip_vit_b16()) == 184_320
    assert trainables(LoRAPlus(rank=3), site(4, 2, 3, 3)) == LoRAPlus(rank=3).count(site(4, 2, 3, 3)) == 66


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 0.5}, "ratio: 0.5 is below 1"),
        ({"ratio": float("nan")}, "ratio: nan"),
        ({"rank": 0}, "rank: 0"),
        ({"scaling": "no"}, "scaling: 'no'"),
        ({"dropout": -0.1}, "dropout: -0.1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LoRAPlus(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        LoRAPlus(rank=10).adapter(site(12, 9), None)
