"""MiLoRA: the start is what the weight does least."""

from __future__ import annotations

import pytest
import torch
from fakes import gradients, moved, site, started, trainables, weight64

from vision_peft.adapters.milora import MiLoRA
from vision_peft.adapters.pissa import PiSSA
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-10}


def smallest(W, k):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, -k:] * S[-k:] @ Vh[-k:]


def test_starts_at_the_identity():
    W = torch.randn(12, 9)
    torch.testing.assert_close(started(MiLoRA(rank=3), W).weight(W), W, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
@pytest.mark.parametrize("alpha", [3.0, 8.0])
def test_the_start_is_the_smallest_triples(shape, alpha):
    W = weight64(*shape)
    adapter = started(MiLoRA(rank=3, alpha=alpha), W)
    torch.testing.assert_close(adapter.scale * adapter.B @ adapter.A, smallest(W, 3), **EXACT)


def test_what_is_frozen_is_the_best_approximation_of_the_complementary_rank():
    W = weight64()
    adapter = started(MiLoRA(rank=3), W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(W - adapter.scale * adapter.B @ adapter.A, U[:, :6] * S[:6] @ Vh[:6], **EXACT)


def test_the_whole_rank_is_pissas_start():
    W = weight64()
    one, other = started(MiLoRA(rank=9), W), started(PiSSA(rank=9), W)
    torch.testing.assert_close(one.B @ one.A, other.B @ other.A, **EXACT)


def test_the_formula_after_training():
    W = weight64()
    adapter = moved(MiLoRA(rank=3, alpha=6.0), W)
    torch.testing.assert_close(adapter.weight(W), W - smallest(W, 3) + 2 * adapter.B @ adapter.A, **EXACT)


def test_the_start_spares_the_principal_directions():
    W = weight64()
    adapter = started(MiLoRA(rank=3), W)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    assert (U[:, :6].mT @ adapter.B).abs().max() < 1e-10
    assert (adapter.A @ Vh[:6].mT).abs().max() < 1e-10


def test_gradients():
    W, G = weight64(), weight64()
    adapter = started(MiLoRA(rank=3, alpha=6.0), W)
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], 2 * G @ adapter.A.mT, **EXACT)
    torch.testing.assert_close(found["A"], 2 * adapter.B.mT @ G, **EXACT)


def test_a_weight_with_zero_singular_values_can_be_trained():
    W = weight64(12, 4) @ weight64(4, 9)
    adapter = started(MiLoRA(rank=3), W)
    torch.testing.assert_close(adapter.weight(W), W, **EXACT)
    assert all(gradient.any() for gradient in gradients(adapter, W, weight64()).values())
    size = (adapter.scale * adapter.B @ adapter.A).detach()
    assert torch.linalg.norm(size, 2) < 2e-6 * torch.linalg.norm(W, 2)


def test_the_start_is_recomputed_and_marked():
    W = weight64()
    adapter = started(MiLoRA(rank=3), W)
    assert set(adapter.state_dict()) == {"A", "B"}
    torch.testing.assert_close(started(MiLoRA(rank=3), W, seed=4).fingerprint(), adapter.fingerprint())
    assert not torch.allclose(started(MiLoRA(rank=4), W).fingerprint(), adapter.fingerprint(), rtol=1e-3)


def test_counts():
    assert MiLoRA().count(site(768, 768)) == 12_288
    assert trainables(MiLoRA(rank=3), site(4, 2, 3, 3)) == MiLoRA(rank=3).count(site(4, 2, 3, 3)) == 66


@pytest.mark.parametrize(
    "options, message",
    [({"rank": 0}, "rank: 0"), ({"alpha": 0.0}, "alpha: 0.0"), ({"scaling": "x"}, "scaling"), ({"dropout": -0.1}, "dropout")],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        MiLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        MiLoRA(rank=10).adapter(site(12, 9), None)
