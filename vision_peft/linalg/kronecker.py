"""Sums of Kronecker products: the rearrangement that turns them into low-rank matrices, and the SVD that gives the best such sum.

For W (m1 m2, n1 n2) with blocks W_ij (m2, n2), R(W) (m1 n1, m2 n2) holds the blocks as rows. R is linear, keeps the Frobenius norm,
and R(A kron B) = vec(A) vec(B)^T with row-major vec, so the SVD of R(W) gives the best sum of r Kronecker products (Van Loan and
Pitsianis, 1993).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from vision_peft.linalg.svd import thin_svd
from vision_peft.linalg.svd_cache import cached_svd


class Split(NamedTuple):
    """Shapes of the factors of a matrix (m1 m2, n1 n2): A (m1, n1), B (m2, n2)."""

    m1: int
    n1: int
    m2: int
    n2: int

    @property
    def terms(self) -> int:
        """How many Kronecker products add up to any matrix."""
        return min(self.m1 * self.n1, self.m2 * self.n2)


class KroneckerSVD(NamedTuple):
    """W = sum over k of S[k] kron(U[k], V[k]); the U are orthonormal among themselves, and so are the V; S descends."""

    U: Tensor  # (K, m1, n1)
    S: Tensor  # (K,)
    V: Tensor  # (K, m2, n2)


def divisor_below(number: int, bound: float) -> int:
    """Largest divisor of the number that is not above the bound (>= 1)."""
    return next(each for each in range(min(number, int(bound)), 0, -1) if number % each == 0)


def balanced_split(rows: int, columns: int) -> Split:
    """The split closest to square roots: m1 and n1 are the largest divisors of rows and columns not above their square roots."""
    m1, n1 = divisor_below(rows, math.isqrt(rows)), divisor_below(columns, math.isqrt(columns))
    return Split(m1, n1, rows // m1, columns // n1)


def rearrange(W: Tensor, split: Split) -> Tensor:
    """R(W) (m1 n1, m2 n2): R[i1 n1 + j1, i2 n2 + j2] = W[i1 m2 + i2, j1 n2 + j2]."""
    m1, n1, m2, n2 = split
    return W.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)


def rearrange_back(R: Tensor, split: Split) -> Tensor:
    """The matrix (m1 m2, n1 n2) whose rearrangement is R."""
    m1, n1, m2, n2 = split
    return R.reshape(m1, n1, m2, n2).transpose(1, 2).reshape(m1 * m2, n1 * n2)


def kronecker_sum(A: Tensor, B: Tensor) -> Tensor:
    """Sum over k of kron(A[k], B[k]), for A (r, m1, n1), B (r, m2, n2), in one product, r multiplications an entry."""
    split = Split(A.shape[1], A.shape[2], B.shape[1], B.shape[2])
    return rearrange_back(A.flatten(1).mT @ B.flatten(1), split)


def kronecker_svd(W: Tensor, split: Split, frozen: bool = True) -> KroneckerSVD:
    """All K terms; those of a frozen weight are kept in the cache of decompositions."""
    m1, n1, m2, n2 = split
    U, S, Vh = (cached_svd if frozen else thin_svd)(rearrange(W, split))
    return KroneckerSVD(U.mT.reshape(-1, m1, n1), S, Vh.reshape(-1, m2, n2))
