"""A linear map after which vectors of one kind vary alike in every direction, so that what they do not vary in counts as much.

    T(f) = c (f - mu) (S / s + shrinkage I)^(-1/2),      S the covariance (d, d) of the vectors, s the mean of its eigenvalues

c makes the mean squared length of the vectors 1. A small shrinkage whitens fully; with a large one the map only centres.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Whitening:
    """Attributes:
        mean: mu (d,), float64.
        matrix: c (S / s + shrinkage I)^(-1/2) (d, d), symmetric, float64.
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, vectors: Tensor, shrinkage: float) -> Whitening:
        """Of (n, d) vectors. ValueError for fewer than two, for vectors that are all the same, or a shrinkage that is not positive."""
        if len(vectors) < 2 or shrinkage <= 0:
            raise ValueError(f"whitening needs at least two vectors and a positive shrinkage, not {len(vectors)} and {shrinkage}")
        exact = vectors.detach().double()
        mean = exact.mean(0)
        values, rows = torch.linalg.eigh((exact - mean).mT @ (exact - mean) / len(exact))
        values = values.clamp(min=0)
        if not values.mean() > 0:
            raise ValueError("whitening needs vectors that differ")
        matrix = rows @ ((values / values.mean() + shrinkage) ** -0.5 * rows).mT
        length = ((exact - mean) @ matrix).square().sum(1).mean().sqrt()
        return cls(mean, matrix / length)

    def __call__(self, vectors: Tensor) -> Tensor:
        """T of (..., d), in their dtype but at least float32; differentiable."""
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        with torch.autocast(vectors.device.type, enabled=False):
            return (vectors - self.mean.to(vectors)) @ self.matrix.to(vectors)
