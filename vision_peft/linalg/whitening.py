"""A linear map after which vectors of one kind vary alike in every direction, so that what they do not vary in counts as much.

    T(f) = c (S / s + shrinkage I)^(-1/2) (f - mu)

S is the covariance (d, d) of n vectors, s the mean of its first min(d, n - 1) eigenvalues; c makes the mean squared length 1. A small
shrinkage whitens fully; with a large one the map only centres. S itself, which may be of tens of thousands of rows, is not built: outside
the span of the vectors the map is a factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Whitening:
    """Attributes:
        mean: mu (d,), float64.
        rows: orthonormal eigenvectors (k, d) of S, k = min(d, n - 1), float64.
        factors: of the map along them (k,), float64.
        elsewhere: its factor in every direction perpendicular to them.
    """

    mean: Tensor
    rows: Tensor
    factors: Tensor
    elsewhere: float

    @classmethod
    def of(cls, vectors: Tensor, shrinkage: float) -> Whitening:
        """Of (n, d) vectors. ValueError for fewer than two, for vectors that are all the same, or a shrinkage that is not positive."""
        if len(vectors) < 2 or shrinkage <= 0:
            raise ValueError(f"whitening needs at least two vectors and a positive shrinkage, not {len(vectors)} and {shrinkage}")
        exact = vectors.detach().double()
        mean = exact.mean(0)
        _, values, rows = torch.linalg.svd(exact - mean, full_matrices=False)
        count = min(exact.shape[1], len(exact) - 1)
        variances, rows = values[:count].square() / len(exact), rows[:count]
        if not variances.mean() > 0:
            raise ValueError("whitening needs vectors that differ")
        factors = (variances / variances.mean() + shrinkage) ** -0.5
        length = (factors.square() * variances).sum().sqrt()
        return cls(mean, rows, factors / length, float(shrinkage**-0.5 / length))

    def __call__(self, vectors: Tensor) -> Tensor:
        """T of (..., d), in their dtype but at least float32; differentiable."""
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        rows, factors = self.rows.to(vectors), self.factors.to(vectors)
        with torch.autocast(vectors.device.type, enabled=False):
            centred = vectors - self.mean.to(vectors)
            return self.elsewhere * centred + (centred @ rows.mT * (factors - self.elsewhere)) @ rows
