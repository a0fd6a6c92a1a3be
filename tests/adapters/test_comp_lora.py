"""Comp-LoRA: what training can never touch, whatever the optimizer does to the raw factors."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.comp_lora import CompLoRA
from vision_peft.adapters.lora import LoRA
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def svd(W, k):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :k], S[:k], Vh[:k]


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    assert torch.equal(started(CompLoRA(), W).weight(W), W)


def test_protecting_nothing_is_lora():
    W = weight64()
    ours = moved(CompLoRA(rank=3, protect_rank=0), W)
    lora = started(LoRA(rank=3, alpha=1.0, scaling="sqrt_rank"), W)
    assert torch.equal(started(CompLoRA(rank=3, protect_rank=0), W).A, lora.A)
    with torch.no_grad():
        lora.A.copy_(ours.A), lora.B.copy_(ours.B)
    torch.testing.assert_close(ours.weight(W), lora.weight(W), **EXACT)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
@pytest.mark.parametrize("k", [1, 4])
def test_protected_triplets_are_triplets_of_the_adapted_weight(shape, k):
    W = weight64(*shape)
    adapter = moved(CompLoRA(rank=3, protect_rank=k), W)
    (U, S, Vh), D = svd(W, k), delta(adapter, W)
    assert D.abs().max() > 0.1
    torch.testing.assert_close(U.mT @ D, torch.zeros(k, shape[1], dtype=torch.float64), **EXACT)
    torch.testing.assert_close(D @ Vh.mT, torch.zeros(shape[0], k, dtype=torch.float64), **EXACT)
    assert abs(float((D * (U * S @ Vh)).sum())) < 1e-11
    torch.testing.assert_close((W + D) @ Vh.mT, U * S, rtol=0, atol=1e-11)
    torch.testing.assert_close((W + D).mT @ U, (S[:, None] * Vh).mT, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sides", ["both", "in", "out"])
def test_sides(sides):
    """Inputs inside the span of V_k pass as before (both, in); outputs along U_k are as before (both, out)."""
    W = weight64()
    D = delta(moved(CompLoRA(rank=3, protect_rank=4, sides=sides), W), W)
    U, _, Vh = svd(W, 4)
    assert (float((D @ Vh.mT).abs().max()) < 1e-12) == (sides != "out")
    assert (float((U.mT @ D).abs().max()) < 1e-12) == (sides != "in")


def test_the_formula_with_dense_projectors():
    W = weight64()
    adapter = moved(CompLoRA(rank=3, alpha=2.0, protect_rank=4), W)
    U, _, Vh = svd(W, 4)
    P_out, P_in = torch.eye(12).double() - U @ U.mT, torch.eye(9).double() - Vh.mT @ Vh
    torch.testing.assert_close(delta(adapter, W), 2 / 3**0.5 * (P_out @ adapter.B) @ (adapter.A @ P_in), rtol=0, atol=1e-11)


def test_rank_of_the_change():
    W = weight64()
    assert torch.linalg.matrix_rank(delta(moved(CompLoRA(rank=3, protect_rank=4), W), W)) == 3
    assert torch.linalg.matrix_rank(delta(moved(CompLoRA(rank=3, protect_rank=6), W), W)) == 3


@pytest.mark.parametrize(
    "protect, k", [({"protect_energy": 0.5}, 1), ({"protect_energy": 0.9}, 2), ({"protect_energy": 0.95}, 2), ({"protect_rank": 3}, 2)]
)
def test_how_many_are_protected(protect, k):
    """Values 3, 2, 1: shares 9/14, 13/14, 1; one dimension must stay free for r = 1."""
    W = torch.diag(torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64))
    assert started(CompLoRA(rank=1, **protect), W).U.shape == (3, k)
    assert started(CompLoRA(rank=3, **protect), W).U.shape == (3, 0)


def test_gradients_of_the_raw_factors_lie_in_the_complement():
    W, G = weight64(), weight64()
    found = gradients(moved(CompLoRA(rank=3, protect_rank=4), W), W, G)
    U, _, Vh = svd(W, 4)
    assert (U.mT @ found["B"]).abs().max() < 1e-12 < found["B"].abs().max()
    assert (found["A"] @ Vh.mT).abs().max() < 1e-12 < found["A"].abs().max()


def test_components_inside_the_protected_spans_never_act():
    W = weight64()
    adapter = moved(CompLoRA(rank=3, protect_rank=4), W)
    before = delta(adapter, W)
    U, _, Vh = svd(W, 4)
    with torch.no_grad():
        adapter.B.add_(U @ torch.randn(4, 3).double())
        adapter.A.add_(torch.randn(3, 4).double() @ Vh)
    torch.testing.assert_close(delta(adapter, W), before, rtol=0, atol=1e-11)


def test_adam_cannot_leave_the_complement():
    """Ten real steps of AdamW on a network; its scaling by coordinate would undo a projection of gradients alone."""
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    adapters = attach(network, CompLoRA(rank=2, dropout=0.0, protect_rank=3), "0")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.05)
    x, target = torch.randn(32, 9), torch.randn(32, 4)
    for _ in range(10):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        optimizer.step()
    W = network[0].weight.detach()
    D = delta(adapters.adapters["0"], W)
    U, _, Vh = svd(W, 3)
    assert D.abs().max() > 0.05
    assert (U.mT @ D).abs().max() < 1e-5
    assert (D @ Vh.mT).abs().max() < 1e-5


def test_the_mark_tells_bases_apart_but_not_signs():
    W = weight64()
    adapter = started(CompLoRA(protect_rank=4), W)
    mark = adapter.fingerprint()
    signs = torch.tensor([1.0, -1, -1, 1]).double()
    adapter.U, adapter.Vh = adapter.U * signs, adapter.Vh * signs[:, None]
    torch.testing.assert_close(adapter.fingerprint(), mark)
    assert not torch.allclose(started(CompLoRA(protect_rank=3), W).fingerprint(), mark, rtol=1e-3)
    assert not torch.allclose(started(CompLoRA(protect_rank=4), W.flip(0)).fingerprint(), mark, rtol=1e-3)


def test_the_basis_is_of_the_slice_not_of_the_fused_weight():
    network = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    adapters = attach(network, CompLoRA(protect_rank=2, dropout=0.0), "attn.v")
    W = network["attn"].in_proj_weight[16:]
    U = svd(W, 2)[0]
    torch.testing.assert_close(adapters.adapters["attn/v"].U.abs(), U.abs(), rtol=1e-4, atol=1e-5)


def test_counts():
    """As LoRA: 184,320 for CLIP ViT-B/16 at r = 2. The bases are not trained and not saved."""
    assert count(CompLoRA(), clip_vit_b16()) == 184_320
    assert trainables(CompLoRA(rank=3), site(12, 9)) == CompLoRA(rank=3).count(site(12, 9)) == 63
    assert set(started(CompLoRA(), weight64()).state_dict()) == {"A", "B"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"protect_energy": 0.0}, "protect_energy: 0.0"),
        ({"protect_energy": 1.5}, "protect_energy: 1.5"),
        ({"protect_rank": -1}, "protect_rank: -1"),
        ({"sides": "left"}, "sides: 'left' is not one of both, in, out"),
        ({"scaling": "no"}, "scaling"),
        ({"rank": 0}, "rank: 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        CompLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        CompLoRA(rank=10).adapter(site(12, 9), None)
