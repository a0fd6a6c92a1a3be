"""LoLDU: the decomposition, every start an identity, gradients by hand, the counts of the paper."""

from __future__ import annotations

import pytest
import torch
from fakes import gradients, moved, site, started, trainables, weight64

from vision_peft.adapters.loldu import LoLDU, ldu, start_values
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-10}
STARTS = ["lu", "uniform", "normal", "constant", "ones", "zeros", "s_uniform", "s_normal"]


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (8, 8), (1, 5), (5, 1)])
def test_the_decomposition(shape):
    W = weight64(*shape)
    PL, D, U = ldu(W)
    torch.testing.assert_close(PL * D @ U, W, **EXACT)
    assert PL.abs().max() <= 1, "partial pivoting"
    torch.testing.assert_close(U.diagonal(), torch.ones(min(shape)).double(), **EXACT)
    torch.testing.assert_close(U.tril(-1), torch.zeros_like(U), **EXACT)


def test_lower_factor_in_the_order_of_the_permutation():
    W = weight64(6, 4)
    P, L, _ = torch.linalg.lu(W)
    torch.testing.assert_close(ldu(W)[0], P @ L, **EXACT)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("options", [{}, {"rank": 4, "alpha": 2.0}])
def test_every_start_is_the_identity_bit_for_bit(init, options):
    W = torch.randn(12, 9)
    adapter = started(LoLDU(init=init, **options), W)
    assert torch.equal(adapter.weight(W), W)


@pytest.mark.parametrize("rank", [4, None])
def test_the_formula(rank):
    W = weight64()
    adapter = moved(LoLDU(rank=rank, alpha=3.0, init="lu"), W)
    P, L, upper = torch.linalg.lu(W)
    D = upper.diagonal()
    r = rank or 9
    L, U = P @ L[:, :r], (upper / D[:, None])[:r]
    residual = W - 3 / r * L @ torch.diag(D[:r]) @ U
    torch.testing.assert_close(adapter.weight(W), residual + adapter.sigma * L @ torch.diag(adapter.z) @ U, **EXACT)


def test_full_rank_from_the_pivots_leaves_no_residual():
    W = weight64()
    adapter = started(LoLDU(init="lu"), W)
    torch.testing.assert_close(adapter.sigma * adapter.PL * adapter.z @ adapter.U, W, **EXACT)


def test_gradients():
    """dz_k = sigma (P L_k)^T G U_k, dsigma = <G, P L diag(z) U>."""
    W, G = weight64(), weight64()
    adapter = moved(LoLDU(rank=5, alpha=2.0), W)
    found = gradients(adapter, W, G)
    core = adapter.PL.mT @ G @ adapter.U.mT
    torch.testing.assert_close(found["z"], adapter.sigma.detach() * core.diagonal(), **EXACT)
    torch.testing.assert_close(found["sigma"], (G * (adapter.PL * adapter.z.detach() @ adapter.U)).sum(), **EXACT)


def test_both_forms_agree():
    W = weight64(24, 20)
    adapter = moved(LoLDU(rank=5), W)
    form = adapter.factored(W)
    torch.testing.assert_close(W + form.B @ form.A, adapter.weight(W), **EXACT)
    assert moved(LoLDU(rank=6), W).factored(W) is None


def test_start_values():
    D = torch.tensor([4.0, -1, 3, 2])
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(start_values(D, "lu", generator), D)
    assert start_values(D, "constant", generator).tolist() == [2.0] * 4
    assert start_values(D, "ones", generator).tolist() == [1.0] * 4
    assert not start_values(D, "zeros", generator).any()
    many = D.repeat(1000)
    drawn = {init: start_values(many, init, generator) for init in ("uniform", "normal", "s_uniform", "s_normal")}
    assert 0.98 < drawn["uniform"].abs().max() <= 1
    assert 0.98 < drawn["s_uniform"].abs().max() <= 1
    assert (drawn["normal"].mean() - 2).abs() < 0.1
    assert (drawn["normal"].std() - many.std()).abs() < 0.1
    assert drawn["s_normal"].mean().abs() < 0.05
    assert (drawn["s_normal"].std() - 1).abs() < 0.05


def test_leading_terms_are_no_approximation():
    """The squared residual of a Gaussian 256 x 256 weight exceeds ||W||^2, unlike an SVD's."""
    W = weight64(256, 256)
    PL, D, U = ldu(W)
    for r in (21, 85, 170):
        assert (W - PL[:, :r] * D[:r] @ U[:r]).square().sum() > W.square().sum()


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_deficient_weights_stay_finite_and_can_be_trained(shape, rank):
    W = (weight64(shape[0], rank) @ weight64(rank, shape[1])).float() if rank else torch.zeros(shape)
    adapter = started(LoLDU(), W)
    assert adapter.U.isfinite().all()
    assert (adapter.U.diagonal() == 1).all()
    found = gradients(adapter, W, torch.randn(shape))
    assert found["z"].isfinite().all()
    assert (found["z"] != 0).all()


def test_the_random_start_is_saved_and_the_factors_are_not():
    W = weight64()
    assert set(started(LoLDU(), W).state_dict()) == {"z", "sigma", "z_0"}
    trained, fresh = moved(LoLDU(), W), started(LoLDU(), W, seed=9)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.weight(W), trained.weight(W))


def test_the_mark_tells_factors_apart():
    W = weight64()
    assert not torch.allclose(started(LoLDU(), W.flip(0)).fingerprint(), started(LoLDU(rank=8), W).fingerprint(), rtol=1e-3)
    swapped = W[:, [0, 1, 2, 3, 4, 5, 6, 8, 7]]
    assert not torch.allclose(started(LoLDU(), swapped).fingerprint(), started(LoLDU(), W).fingerprint(), rtol=1e-3)


def test_counts():
    """ViT-B, q and v: 18,456 at r = 768; 24 at r = 1 without sigma. The scalar then stays where it is."""
    assert 24 * LoLDU().count(site(768, 768)) == 18_456
    assert 24 * LoLDU(rank=1, train_sigma=False).count(site(768, 768)) == 24
    for method in (LoLDU(), LoLDU(rank=3), LoLDU(rank=3, train_sigma=False)):
        assert trainables(method, site(8, 4, 3, 3)) == method.count(site(8, 4, 3, 3))


@pytest.mark.parametrize(
    "options, message",
    [({"init": "svd"}, "init: 'svd' is not one of lu, uniform"), ({"alpha": 0.0}, "alpha: 0.0"), ({"alpha": -1.0}, "alpha: -1.0")],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LoLDU(**options)


@pytest.mark.parametrize("rank", [0, 10])
def test_a_rank_that_does_not_fit(rank):
    with pytest.raises(UserError, match=f"rank: {rank} does not fit"):
        LoLDU(rank=rank).adapter(site(12, 9), None)
