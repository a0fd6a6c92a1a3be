"""SVFit: only the spectrum moves."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64

from vision_peft.adapters.svfit import SVFit
from vision_peft.errors import UserError


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    assert torch.equal(started(SVFit(), W).weight(W), W)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10)])
@pytest.mark.parametrize("rank", [1, 4, None])
def test_singular_vectors_stay_and_values_move_by_d(shape, rank):
    """U^T (W' - W) V = diag(d) for the leading pairs and zero elsewhere; its norm is that of d."""
    W = weight64(*shape)
    adapter = moved(SVFit(rank), W)
    r, D = rank or min(shape), delta(adapter, W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    middle = U.mT @ D @ Vh.mT
    torch.testing.assert_close(middle - torch.diag(middle.diag()), torch.zeros_like(middle), rtol=0, atol=1e-11)
    torch.testing.assert_close(middle.diag()[:r], adapter.d.detach(), rtol=0, atol=1e-11)
    assert middle.diag()[r:].abs().sum() < 1e-11
    torch.testing.assert_close(D.norm(), adapter.d.detach().norm(), rtol=1e-11, atol=0)
    torch.testing.assert_close(
        torch.linalg.svdvals(W + D),
        (S + torch.nn.functional.pad(middle.diag()[:r], (0, len(S) - r))).abs().sort(descending=True).values,
        rtol=1e-10,
        atol=1e-11,
    )


def test_gradient_is_that_of_the_singular_value():
    """dL/dsigma_k = u_k^T G v_k."""
    W, G = weight64(), weight64()
    adapter = moved(SVFit(5), W)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(gradients(adapter, W, G)["d"], (U.mT @ G @ Vh.mT).diag()[:5], rtol=0, atol=1e-11)


def test_signs_of_a_pair_do_not_matter():
    W = weight64()
    adapter = moved(SVFit(4), W)
    before, mark, signs = delta(adapter, W), adapter.fingerprint(), torch.tensor([1.0, -1, 1, -1]).double()
    adapter.U, adapter.Vh = adapter.U * signs, adapter.Vh * signs[:, None]
    torch.testing.assert_close(delta(adapter, W), before, rtol=0, atol=1e-14)
    torch.testing.assert_close(adapter.fingerprint(), mark, rtol=1e-12, atol=1e-12)


def test_the_mark_tells_weights_and_ranks_apart():
    W = weight64()
    mark = started(SVFit(4), W).fingerprint()
    for other in (started(SVFit(5), W), started(SVFit(4), W + 0.1 * weight64()), started(SVFit(4), W.flip(1))):
        assert not torch.allclose(other.fingerprint(), mark, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank, factored", [(2, True), (3, False), (None, False)])
def test_factored_only_while_the_rank_is_small_and_then_the_same(rank, factored):
    W = weight64(12, 9)
    adapter = moved(SVFit(rank), W)
    form = adapter.factored(W)
    assert (form is not None) == factored
    if factored:
        torch.testing.assert_close(W + form.B @ form.A, adapter.weight(W), rtol=0, atol=1e-12)


def test_only_the_offsets_are_saved():
    adapter = started(SVFit(), weight64())
    assert set(adapter.state_dict()) == {"d"}
    assert [name for name, _ in adapter.named_parameters()] == ["d"]


def test_counts():
    """768 for a 768 x 768 weight; q and v of ViT-B: 18,432, sixteen times fewer than LoRA at r = 8; of ViT-L: 49,152."""
    assert SVFit().count(site(768, 768)) == 768
    assert 24 * SVFit().count(site(768, 768)) == 18_432
    assert 48 * SVFit(1024).count(site(1024, 1024)) == 49_152
    assert SVFit(4).count(site(12, 9)) == trainables(SVFit(4), site(12, 9)) == 4
    assert SVFit().count(site(4, 2, 3, 3)) == trainables(SVFit(), site(4, 2, 3, 3)) == 4


@pytest.mark.parametrize("rank", [0, 10, -1])
def test_a_rank_that_does_not_fit(rank):
    with pytest.raises(UserError, match=rf"rank: {rank} does not fit"):
        SVFit(rank).adapter(site(12, 9), None)
