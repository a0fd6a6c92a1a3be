"""MoSLoRA: the mixer's formula, its starts, and LoRA where it is the identity."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.moslora import MoSLoRA
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("mixer", ["kaiming", "orthogonal", "identity"])
def test_starts_at_the_identity_with_the_factors_of_lora(mixer):
    W = torch.randn(12, 9)
    adapter = started(MoSLoRA(rank=3, mixer=mixer), W)
    assert torch.equal(adapter.weight(W), W)
    assert torch.equal(adapter.A, started(LoRA(rank=3), W).A)


def test_the_formula():
    W = weight64()
    adapter = moved(MoSLoRA(rank=3, alpha=2.0), W)
    expected = 2 / 3 * torch.einsum("oj,jk,ki->oi", adapter.B, adapter.M, adapter.A)
    torch.testing.assert_close(delta(adapter, W), expected.detach(), **EXACT)
    assert torch.linalg.matrix_rank(delta(adapter, W)) == 3


def test_with_the_identity_between_them_it_is_lora():
    W = weight64()
    adapter, lora = moved(MoSLoRA(rank=3, alpha=2.0), W), started(LoRA(rank=3, alpha=2.0), W)
    with torch.no_grad():
        adapter.M.copy_(torch.eye(3))
        lora.A.copy_(adapter.A), lora.B.copy_(adapter.B)
    torch.testing.assert_close(adapter.weight(W), lora.weight(W), **EXACT)


def test_gradients():
    """g_B = s G (M A)^T, g_M = s B^T G A^T, g_A = s M^T B^T G."""
    W, G = weight64(), weight64()
    adapter = moved(MoSLoRA(rank=3, alpha=2.0), W)
    found, s = gradients(adapter, W, G), 2 / 3
    torch.testing.assert_close(found["B"], s * G @ adapter.A.mT @ adapter.M.mT, **EXACT)
    torch.testing.assert_close(found["M"], s * adapter.B.mT @ G @ adapter.A.mT, **EXACT)
    torch.testing.assert_close(found["A"], s * adapter.M.mT @ adapter.B.mT @ G, **EXACT)


def test_the_starts_of_the_mixer():
    W = torch.randn(12, 9)
    kaiming, rotation, identity = (started(MoSLoRA(rank=8, mixer=each), W).M.detach() for each in ("kaiming", "orthogonal", "identity"))
    assert 0.8 / 8**0.5 < kaiming.abs().max() <= 1 / 8**0.5
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(8), rtol=0, atol=1e-5)
    assert (rotation - torch.eye(8)).abs().max() > 0.1
    assert torch.equal(identity, torch.eye(8))


def test_draws_are_the_seeds():
    W = torch.randn(12, 9)
    one, again, other = (started(MoSLoRA(rank=3), W, seed).M for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_training_makes_the_mixer_dense():
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    adapters = attach(network, MoSLoRA(rank=2, mixer="identity"), "all")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    x, target = torch.randn(32, 9), torch.randn(32, 4)
    for _ in range(5):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        optimizer.step()
    assert (adapters.adapters["0"].M - torch.eye(2)).abs().min() > 1e-4


def test_counts():
    """12,352 for 768 x 768 at r = 8."""
    assert MoSLoRA(rank=8).count(site(768, 768)) == 12_352
    assert count(MoSLoRA(rank=2), clip_vit_b16()) == 184_320 + 72 * 4
    assert trainables(MoSLoRA(rank=3), site(4, 2, 3, 3)) == MoSLoRA(rank=3).count(site(4, 2, 3, 3)) == 75


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mixer": "zero"}, "mixer: 'zero' is not one of kaiming, orthogonal, identity"),
        ({"rank": 0}, "rank: 0"),
        ({"scaling": "no"}, "scaling: 'no'"),
        ({"dropout": 1.0}, "dropout: 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        MoSLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        MoSLoRA(rank=10).adapter(site(12, 9), None)
