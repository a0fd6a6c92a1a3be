"""Rearrangement against torch.kron, and what the SVD of it must give."""

from __future__ import annotations

import pytest
import torch

from vision_peft.linalg.kronecker import Split, balanced_split, divisor_below, kronecker_sum, kronecker_svd, rearrange, rearrange_back

EXACT = {"rtol": 0, "atol": 1e-12}
SPLITS = [Split(2, 3, 4, 5), Split(4, 1, 2, 9), Split(1, 1, 6, 7), Split(6, 1, 1, 7), Split(3, 4, 2, 1)]


def matrix(split: Split) -> torch.Tensor:
    return torch.randn(split.m1 * split.m2, split.n1 * split.n2, dtype=torch.float64)


@pytest.mark.parametrize("split", SPLITS)
def test_rearrangement_of_a_product_is_an_outer_product(split):
    A, B = torch.randn(split.m1, split.n1), torch.randn(split.m2, split.n2)
    assert torch.equal(rearrange(torch.kron(A, B), split), torch.outer(A.flatten(), B.flatten()))


@pytest.mark.parametrize("split", SPLITS)
def test_rearrangement_by_index_and_back(split):
    W = matrix(split)
    R = rearrange(W, split)
    m1, n1, m2, n2 = split
    for i1, j1, i2, j2 in [(0, 0, 0, 0), (m1 - 1, 0, m2 - 1, n2 - 1), (m1 // 2, n1 - 1, m2 // 2, n2 // 2)]:
        assert R[i1 * n1 + j1, i2 * n2 + j2] == W[i1 * m2 + i2, j1 * n2 + j2]
    assert torch.equal(rearrange_back(R, split), W)


@pytest.mark.parametrize("split", SPLITS)
def test_sum_of_products(split):
    A, B = torch.randn(3, split.m1, split.n1).double(), torch.randn(3, split.m2, split.n2).double()
    torch.testing.assert_close(kronecker_sum(A, B), sum(torch.kron(a, b) for a, b in zip(A, B)), **EXACT)


@pytest.mark.parametrize("split", SPLITS)
def test_all_terms_give_the_matrix(split):
    W = matrix(split)
    U, S, V = kronecker_svd(W, split)
    assert len(S) == split.terms
    torch.testing.assert_close(sum(s * torch.kron(u.contiguous(), v.contiguous()) for u, s, v in zip(U, S, V)), W, **EXACT)
    assert (S[:-1] >= S[1:]).all()


def test_terms_are_orthonormal_and_the_residual_is_what_is_left():
    split = Split(3, 2, 4, 5)
    W = matrix(split)
    U, S, V = kronecker_svd(W, split)
    terms = torch.stack([torch.kron(u.contiguous(), v.contiguous()).flatten() for u, v in zip(U, V)])
    torch.testing.assert_close(terms @ terms.mT, torch.eye(len(S)).double(), **EXACT)
    for r in range(len(S)):
        residual = W - kronecker_sum(S[:r, None, None] * U[:r], V[:r])
        torch.testing.assert_close(residual.square().sum(), S[r:].square().sum(), rtol=1e-10, atol=0)


def test_splits_that_are_known_decompositions():
    W = torch.randn(6, 7, dtype=torch.float64)
    ordinary = kronecker_svd(W, Split(6, 1, 1, 7))
    torch.testing.assert_close(ordinary.S, torch.linalg.svdvals(W), **EXACT)
    whole = kronecker_svd(W, Split(1, 1, 6, 7))
    assert whole.S.shape == (1,)
    torch.testing.assert_close(whole.S[0] * whole.U[0] * whole.V[0], W, **EXACT)


@pytest.mark.parametrize("number, divisor", [(768, 24), (3072, 48), (1024, 32), (1, 1), (7, 1), (12, 3), (9, 3), (588, 21)])
def test_divisors(number, divisor):
    assert divisor_below(number, number**0.5) == divisor


def test_balanced_split():
    assert balanced_split(768, 3072) == Split(24, 48, 32, 64)
    assert balanced_split(7, 9) == Split(1, 3, 7, 3)
