"""Sine-LoRA: the sine of the weight update, not of the branch's output; high rank; LoRA in the limit."""

from __future__ import annotations

import math

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.sine_lora import SineLoRA
from vision_peft.engine.install import attach, merge
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    assert torch.equal(started(SineLoRA(rank=3), W).weight(W), W)


@pytest.mark.parametrize("gain, g", [(None, 3.0), (5.0, 5.0)])
def test_the_formula_entry_by_entry(gain, g):
    """g is sqrt(9) by default."""
    W = weight64()
    adapter = moved(SineLoRA(rank=3, alpha=2.0, omega=7.0, gain=gain), W)
    product = adapter.B.detach() @ adapter.A.detach()
    expected = torch.tensor([[2 / 3 * math.sin(7 * float(z)) / g for z in row] for row in product], dtype=torch.float64)
    torch.testing.assert_close(delta(adapter, W), expected, rtol=0, atol=1e-11)


def test_gradients_by_hand():
    """dB = s omega / g (G cos(omega B A)) A^T, dA = s omega / g B^T (G cos(omega B A))."""
    W, G = weight64(), weight64()
    adapter = moved(SineLoRA(rank=3, alpha=2.0, omega=5.0, gain=4.0), W)
    found = gradients(adapter, W, G)
    A, B = adapter.A.detach(), adapter.B.detach()
    H = 2 / 3 * 5 / 4 * G * torch.cos(5 * B @ A)
    torch.testing.assert_close(found["B"], H @ A.mT, rtol=0, atol=1e-11)
    torch.testing.assert_close(found["A"], B.mT @ H, rtol=0, atol=1e-11)


def test_at_the_start_it_moves_omega_over_g_times_as_fast_as_lora():
    W, G = weight64(), weight64()
    ours, lora = started(SineLoRA(rank=3, omega=200.0), W), started(LoRA(rank=3), W)
    assert torch.equal(ours.A, lora.A)
    ours, lora = gradients(ours, W, G), gradients(lora, W, G)
    torch.testing.assert_close(ours["B"], 200 / 3 * lora["B"], rtol=1e-12, atol=0)
    assert not ours["A"].any()


def test_a_small_frequency_is_lora():
    W = weight64()
    adapter = moved(SineLoRA(rank=3, alpha=3.0, omega=1e-4, gain=1e-4), W)
    torch.testing.assert_close(delta(adapter, W), (adapter.B @ adapter.A).detach(), rtol=1e-6, atol=1e-6)


def test_the_frequency_raises_the_rank():
    W = weight64(30, 24)
    assert torch.linalg.matrix_rank(delta(moved(SineLoRA(rank=2, omega=20.0), W), W)) == 24
    assert torch.linalg.matrix_rank(delta(moved(LoRA(rank=2), W), W)) == 2


def test_entries_are_bounded():
    W = weight64()
    assert delta(moved(SineLoRA(rank=3, alpha=6.0), W), W).abs().max() <= 2 / 3


def test_merged_it_is_the_same_map():
    network = nn.Sequential(nn.Linear(9, 12))
    adapter = attach(network, SineLoRA(rank=3), "all").adapters["0"]
    nn.init.normal_(adapter.B)
    x = torch.randn(5, 9)
    before = network(x)
    assert (before - x @ network[0].weight.mT - network[0].bias).abs().max() > 0.1
    merge(network)
    torch.testing.assert_close(network(x), before)


def test_counts():
    assert SineLoRA(rank=8).count(site(768, 768)) == 12_288
    for shape in ((12, 9), (4, 2, 3, 3)):
        assert trainables(SineLoRA(rank=3), site(*shape)) == SineLoRA(rank=3).count(site(*shape))


@pytest.mark.parametrize(
    "options, message",
    [({"omega": 0.0}, "omega: 0.0 is not positive"), ({"gain": 0.0}, "gain: 0.0 is not positive"), ({"rank": 0}, "rank: 0")],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        SineLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        SineLoRA(rank=10).adapter(site(12, 9), None)
