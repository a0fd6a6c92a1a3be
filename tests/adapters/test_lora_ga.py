"""LoRA-GA: which singular vectors of the gradient, how long, and that the first step is the best low-rank one."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, site, trainables, weight64

from vision_peft.adapters.lora_ga import LoRAGA
from vision_peft.engine.adapter import Evidence
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-11}


def started(method, W, G):
    adapter = method.adapter(site(*W.shape), None).to(W.dtype)
    with torch.no_grad():
        adapter.initialize(W, Evidence(torch.Generator().manual_seed(0), gradient=G))
    return adapter


def projector(rows):
    """Orthogonal projector on the row space."""
    Q = torch.linalg.qr(rows.detach().mT).Q
    return Q @ Q.mT


def test_starts_at_the_identity():
    W = torch.randn(12, 9)
    torch.testing.assert_close(started(LoRAGA(rank=3), W, torch.randn(12, 9)).weight(W), W, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "direction, for_B, for_A",
    [("ArB2r", [3, 4, 5], [0, 1, 2]), ("A2rBr", [0, 1, 2], [3, 4, 5]), ("ArBr", [0, 2, 4], [1, 3, 5])],
)
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_directions(direction, for_B, for_A, shape):
    W, G = weight64(*shape), weight64(*shape)
    adapter = started(LoRAGA(rank=3, direction=direction, size="unit"), W, G)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(adapter.B.abs(), U[:, for_B].abs(), **EXACT)
    torch.testing.assert_close(adapter.A.abs(), Vh[for_A].abs(), **EXACT)


@pytest.mark.parametrize(
    "direction, for_B, for_A",
    [("ArB2r", [1, 2, 3], [0, 1, 2]), ("A2rBr", [0, 1, 2], [1, 2, 3]), ("ArBr", [0, 2, 1], [2, 1, 3])],
)
def test_where_there_are_less_than_2_r_vectors_the_two_groups_overlap(direction, for_B, for_A):
    W, G = weight64(12, 4), weight64(12, 4)
    adapter = started(LoRAGA(rank=3, direction=direction, size="unit"), W, G)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(adapter.B.abs(), U[:, for_B].abs(), **EXACT)
    torch.testing.assert_close(adapter.A.abs(), Vh[for_A].abs(), **EXACT)


@pytest.mark.parametrize(
    "size, length",
    [
        ("stable", lambda W: 12**0.25 / 4),
        ("unit", lambda W: 1.0),
        ("gd", lambda W: 1 / 2),
        ("weightS", lambda W: float((torch.linalg.svdvals(W)[:3] / 2).sqrt().mean())),
    ],
)
def test_sizes(size, length):
    """s = 6 / 3; stable takes m, the output's width, for both factors."""
    W = weight64()
    adapter = started(LoRAGA(rank=3, alpha=6.0, scaling="rank", size=size), W, weight64())
    gram = length(W) ** 2 * torch.eye(3).double()
    torch.testing.assert_close(adapter.A @ adapter.A.mT, gram, **EXACT)
    torch.testing.assert_close(adapter.B.mT @ adapter.B, gram, **EXACT)


def test_gamma():
    W, G = weight64(), weight64()
    one, other = (started(LoRAGA(rank=3, gamma=gamma), W, G) for gamma in (16.0, 64.0))
    torch.testing.assert_close(one.A, 2 * other.A, **EXACT)
    torch.testing.assert_close(one.B, 2 * other.B, **EXACT)


def test_norm_clip_shrinks_both_factors_to_the_largest_entry_of_the_weight():
    W, G = 0.01 * weight64(), weight64()
    free, clipped = started(LoRAGA(rank=3), W, G), started(LoRAGA(rank=3, norm_clip=True), W, G)
    assert (free.scale * free.B @ free.A).abs().max() > 10 * W.abs().max()
    torch.testing.assert_close((clipped.scale * clipped.B @ clipped.A).abs().max(), W.abs().max(), **EXACT)
    torch.testing.assert_close(clipped.A / clipped.A.norm(), free.A / free.A.norm(), **EXACT)
    assert abs(float((clipped.A.norm() / clipped.B.norm() / (free.A.norm() / free.B.norm())).detach()) - 1) < 1e-10
    torch.testing.assert_close(clipped.weight(W), W, **EXACT)


def test_norm_clip_leaves_a_small_start_alone():
    W, G = 1000 * weight64(), weight64()
    assert torch.equal(started(LoRAGA(rank=3, norm_clip=True), W, G).A, started(LoRAGA(rank=3), W, G).A)


def test_the_first_step_is_the_best_of_rank_2_r():
    """A gradient step on A and B moves W along B B^T G + G A^T A: with equal lengths c, c^2 times the 2 r leading triples of G."""
    W, G = weight64(), weight64()
    adapter = started(LoRAGA(rank=3, size="unit", alpha=3.0, scaling="rank"), W, G)
    found = gradients(adapter, W, G)
    step = (found["B"] @ adapter.A + adapter.B @ found["A"]).detach()
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(step, U[:, :6] * S[:6] @ Vh[:6], **EXACT)


def test_the_formula_after_training():
    W, G = weight64(), weight64()
    adapter = started(LoRAGA(rank=3, alpha=6.0, scaling="rank"), W, G)
    B0, A0 = adapter.B.detach().clone(), adapter.A.detach().clone()
    with torch.no_grad():
        adapter.A.normal_(), adapter.B.normal_()
    torch.testing.assert_close(delta(adapter, W), (2 * (adapter.B @ adapter.A - B0 @ A0)).detach(), **EXACT)


def test_the_sign_of_the_gradient_does_not_matter():
    W, G = weight64(), weight64()
    one, other = started(LoRAGA(rank=3), W, G), started(LoRAGA(rank=3), W, -G)
    torch.testing.assert_close(projector(one.A), projector(other.A), **EXACT)
    torch.testing.assert_close(projector(one.B.mT), projector(other.B.mT), **EXACT)


def test_a_gradient_of_zero_or_of_low_rank_gives_a_start_that_trains():
    W = torch.randn(12, 9)
    for G in (torch.zeros(12, 9), torch.randn(12, 1) @ torch.randn(1, 9)):
        adapter = started(LoRAGA(rank=3), W, G)
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(adapter, W, torch.randn(12, 9)).values())


def test_the_start_is_stored_and_needs_no_evidence_on_load():
    W, G = torch.randn(12, 9), torch.randn(12, 9)
    adapter = started(LoRAGA(rank=3), W, G)
    with torch.no_grad():
        adapter.A.normal_(), adapter.B.normal_()
    assert set(adapter.state_dict()) == {"A", "B", "A0", "B0"}
    assert adapter.fingerprint() is None
    other = started(LoRAGA(rank=3), W, None)
    assert torch.equal(other.weight(W), W)
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other.weight(W), adapter.weight(W))


def test_counts():
    assert LoRAGA().count(site(768, 768)) == 12_288
    assert trainables(LoRAGA(rank=3), site(4, 2, 3, 3)) == LoRAGA(rank=3).count(site(4, 2, 3, 3)) == 66


@pytest.mark.parametrize(
    "options, message",
    [
        ({"direction": "random"}, "direction: 'random' is not one of ArB2r, A2rBr, ArBr"),
        ({"size": "large"}, "size: 'large' is not one of stable, gd, unit, weightS"),
        ({"gamma": 0.0}, "gamma: 0.0 is not positive"),
        ({"alpha": 0.0}, "alpha: 0.0"),
        ({"rank": 0}, "rank: 0"),
        ({"scaling": "x"}, "scaling"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LoRAGA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        LoRAGA(rank=10).adapter(site(12, 9), None)
