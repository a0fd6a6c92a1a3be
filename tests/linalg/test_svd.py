"""thin_svd against torch's own, energy ranks by hand, and marks that see a changed basis but not a changed sign."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vision_peft.linalg.init import kaiming_rows_
from vision_peft.linalg.svd import basis_mark, energy_rank, thin_svd


def with_values(rows: int, columns: int, values: Tensor) -> Tensor:
    """A float64 matrix with these singular values."""
    U = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64))[0]
    return (U * values) @ V.mT


def orthogonality(U: Tensor, Vh: Tensor) -> float:
    eye = torch.eye(U.shape[1], dtype=U.dtype)
    return float(max((U.mT @ U - eye).abs().max(), (Vh @ Vh.mT - eye).abs().max()))


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_torch(shape, dtype):
    W = torch.randn(shape, dtype=torch.float64).to(dtype)
    U, S, Vh = thin_svd(W)
    own = torch.linalg.svd(W.double(), full_matrices=False)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    assert U.dtype == S.dtype == Vh.dtype == dtype
    assert (U.shape, S.shape, Vh.shape) == (own.U.shape, own.S.shape, own.Vh.shape)
    assert U.is_contiguous() and Vh.is_contiguous()
    assert (S[:-1] >= S[1:]).all()
    torch.testing.assert_close(S.double(), own.S, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close((U * S @ Vh).double(), W.double(), rtol=0, atol=20 * tolerance)
    assert orthogonality(U, Vh) < tolerance
    for k in range(len(S)):  # distinct values: each pair is determined up to its sign
        torch.testing.assert_close(torch.outer(U[:, k], Vh[k]).double(), torch.outer(own.U[:, k], own.Vh[k]), rtol=0, atol=1e3 * tolerance)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_rank_deficient(shape, rank):
    W = with_values(*shape, torch.linspace(3, 1, rank, dtype=torch.float64)) if rank else torch.zeros(shape, dtype=torch.float64)
    U, S, Vh = thin_svd(W)
    assert orthogonality(U, Vh) < 1e-12, "the null space must be spanned too"
    assert (S[:rank] - torch.linspace(3, 1, rank, dtype=torch.float64)).abs().sum() < 1e-12
    assert S[rank:].abs().max() < 1e-12
    torch.testing.assert_close(U * S @ Vh, W, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decades", [2, 4, 5, 6, 8, 12])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_ill_conditioned(shape, decades):
    """Never worse than a direct decomposition in float32: bases orthogonal, singular values exact to a part of the largest."""
    values = torch.logspace(0, -decades, 24, dtype=torch.float64)
    W = with_values(*shape, values)
    U, S, Vh = thin_svd(W)
    direct = torch.linalg.svd(W.float(), full_matrices=False)
    assert orthogonality(U, Vh) <= max(orthogonality(direct.U, direct.Vh), 1e-6)
    assert ((S - values) / values).abs().max() <= max(float(((direct.S - values) / values).abs().max()), 1e-10)


def test_does_not_touch_its_input_or_the_global_generator():
    W = torch.randn(6, 4)
    copy, state = W.clone(), torch.get_rng_state()
    thin_svd(W)
    assert torch.equal(W, copy)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("energy, k", [(0.1, 1), (9 / 14, 1), (0.65, 2), (0.9, 2), (13 / 14, 2), (0.95, 3), (1.0, 3)])
def test_energy_rank_of_3_2_1(energy, k):
    """Energies 9/14, 13/14, 1."""
    assert energy_rank(torch.tensor([3.0, 2.0, 1.0]), energy) == k


def test_energy_rank_at_the_edges():
    assert energy_rank(torch.zeros(4), 0.9) == 1
    assert energy_rank(torch.tensor([5.0]), 1.0) == 1
    assert energy_rank(torch.ones(1000), 1.0) == 1000
    assert energy_rank(torch.tensor([1.0, 1e-12]), 1.0) == 1  # beyond what the sum can tell


def test_basis_mark_ignores_signs():
    U, _, Vh = thin_svd(torch.randn(30, 20, dtype=torch.float64))
    signs = torch.where(torch.rand(20) < 0.5, -1.0, 1.0).double()
    torch.testing.assert_close(basis_mark(U * signs, Vh * signs[:, None]), basis_mark(U, Vh), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", range(19))
def test_basis_mark_sees_every_pair(k):
    """Exchanging two pairs, or the sign of one side alone, changes the mark by more than loading tolerates."""
    U, _, Vh = thin_svd(torch.randn(30, 20, dtype=torch.float64))
    mark, order, flipped = basis_mark(U, Vh), list(range(20)), U.clone()
    order[k], order[k + 1] = k + 1, k
    flipped[:, k] *= -1
    assert not torch.allclose(basis_mark(U[:, order], Vh[order]), mark, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(basis_mark(flipped, Vh), mark, rtol=1e-3, atol=1e-4)


def test_basis_mark_sees_other_weights_and_is_small():
    one, two = (basis_mark(*(thin_svd(torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)))[::2])) for seed in (0, 1))
    assert one.shape == (2,)
    assert not torch.allclose(one, two, rtol=1e-3, atol=1e-4)
    assert torch.equal(basis_mark(torch.zeros(5, 0), torch.zeros(0, 4)), torch.zeros(2))


def test_kaiming_rows():
    """U(-1/sqrt(n), 1/sqrt(n)), from the given generator alone."""
    state = torch.get_rng_state()
    drawn = kaiming_rows_(torch.empty(200, 25), torch.Generator().manual_seed(1))
    assert torch.equal(drawn, kaiming_rows_(torch.empty(200, 25), torch.Generator().manual_seed(1)))
    assert torch.equal(state, torch.get_rng_state())
    assert drawn.abs().max() <= 0.2
    assert drawn.min() < -0.199 and drawn.max() > 0.199
    assert abs(float(drawn.mean())) < 0.006
    assert abs(float(drawn.var()) - 0.04 / 3) < 5e-4
    reference = torch.nn.init.kaiming_uniform_(torch.empty(200, 25), a=5**0.5)
    assert abs(float(drawn.std() / reference.std()) - 1) < 0.05
