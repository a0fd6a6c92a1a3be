"""The subspace that a few vectors span: their affine hull, or the linear span with the origin.

    P(f) = mu + B^T B (f - mu)      affine: mu the mean, B (k, d) orthonormal rows spanning {f_j - mu}      linear: mu = 0, B spans {f_j}

A single vector's affine hull is a point. Affine hulls move with the vectors (a translation of all is one of the hull); a linear span holds
the origin, and where embeddings lie in a narrow cone most of any other embedding, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NEGLIGIBLE = 1e-6  # singular values, of the largest


@dataclass(frozen=True)
class Subspace:
    """Attributes:
        mean: mu (d,), float64.
        basis: B (k, d), float64.
    """

    mean: Tensor
    basis: Tensor

    @classmethod
    def of(cls, vectors: Tensor, kind: Literal["affine", "linear"] = "affine", energy: float = 1.0) -> Subspace:
        """Of (n, d) vectors.

        Args:
            energy: share of the squared singular values that is kept, largest first.

        Raises:
            ValueError: no vectors, some that are not finite, an unknown kind, an energy outside its range, or so many directions (more
                than d / 2) that next to nothing would be outside.
        """
        if kind not in ("affine", "linear"):
            raise ValueError(f"kind must be 'affine' or 'linear', not {kind!r}")
        if vectors.ndim != 2 or not len(vectors):
            raise ValueError(f"a subspace needs vectors (n, d), not {tuple(vectors.shape)}")
        if not 0 < energy <= 1:
            raise ValueError(f"energy must be above 0 and at most 1, not {energy}")
        exact = vectors.detach().double()
        if not exact.isfinite().all():
            raise ValueError("a subspace needs finite vectors: some entries are nan or infinite")
        mean = exact.mean(0) if kind == "affine" else torch.zeros_like(exact[0])
        _, values, rows = torch.linalg.svd(exact - mean, full_matrices=False)
        # a floor beside rounding: copies of one vector differ from their mean by 1e-16, which is no direction
        kept = int((values > max(NEGLIGIBLE * float(values[0]), 1e-12 * float(exact.norm()))).sum())
        if energy < 1 and kept:
            shares = values[:kept].square().cumsum(0) / values[:kept].square().sum()
            kept = min(kept, int((shares < energy).sum()) + 1)
        if 2 * kept > exact.shape[1]:
            raise ValueError(f"{len(exact)} vectors span {kept} of {exact.shape[1]} dimensions: nearly everything would lie in it")
        return cls(mean, rows[:kept])

    def project(self, vectors: Tensor) -> Tensor:
        """P of (..., d), in their dtype but at least float32; differentiable."""
        # a loss lives on f - P(f), a small difference of near-equal vectors: half precision, or autocast's products in it, would lose it
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        basis, mean = self.basis.to(vectors), self.mean.to(vectors)
        with torch.autocast(vectors.device.type, enabled=False):
            return mean + (vectors - mean) @ basis.mT @ basis

    def residual(self, vectors: Tensor) -> Tensor:
        """f - P(f)."""
        return vectors - self.project(vectors)

    def distance(self, vectors: Tensor, power: int = 2) -> Tensor:
        """|f - P(f)|^power (...,), power 1 or 2; ValueError for another."""
        if power not in (1, 2):
            raise ValueError(f"the power of a distance must be 1 or 2, not {power}")
        squared = self.residual(vectors).square().sum(-1)
        return squared if power == 2 else squared.clamp(min=1e-24).sqrt()  # the root's slope at 0 is infinite
