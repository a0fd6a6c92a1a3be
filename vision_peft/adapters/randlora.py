"""RandLoRA: an update of full rank, the sum of many random low-rank products of which only diagonals are trained.

    W' = W + s S  (n <= m)  or  W + s S^T  (n > m),      S = sum_i B_i diag(lambda_i) A diag(gamma_i),   i = 1 ... N

W (m, n); q = min(m, n) and p = max(m, n); N = ceil(q / r) bases. B_i (p, r) and A (r, q) are random and frozen, A the same for all i;
lambda_i (r,) and gamma_i (q,) are trained. gamma lies on the short side, which keeps the count low: N (r + q) numbers a weight, about
q^2 / r, so a smaller r means MORE of them. Each term has rank r, the sum reaches rank q. Start: lambda = 0 and gamma = 1 / q, so W' = W.
The bases are shared by all layers: one A and one stack B, of which each layer takes the first q columns, the first p rows and the first
N bases. Their entries are uniform with mean square 1, drawn from the run's seed; they are not saved but drawn again on load.

s = alpha / (r sqrt(N)), alpha = 2 r by default: |S| grows like sqrt(N r). `scaling: rank` is alpha / r, as in PEFT.

Source: Albert et al., "RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models", ICLR 2025 (code: PaulAlbert31/RandLoRA,
and huggingface/peft, against whose layer it is checked). The official codes pair the columns of B with the rows of A in another order,
which relabels random numbers; here the formula is followed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_dropout
from vision_peft.adapters._random_bases import Basis, RandomBases, require_positive
from vision_peft.engine.adapter import Adapter, Evidence, Factored, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class RandLoRAAdapter(Adapter):
    shared: RandomBases  # A (r, largest q), B (largest p, largest N * r)

    def __init__(self, site: Site, method: RandLoRA, shared: RandomBases) -> None:
        super().__init__()
        out, columns = site.matrix_shape
        self.short, self.long, self.wide = min(out, columns), max(out, columns), columns > out
        bases = method.bases(self.short)
        self.scale, self.dropout = method.scale(bases), method.dropout
        object.__setattr__(self, "shared", shared)  # no child: saved and moved once, not with every adapter
        self.lambdas = nn.Parameter(torch.zeros(bases, method.rank))  # (N, r)
        self.gammas = nn.Parameter(torch.zeros(bases, self.short))  # (N, q)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.lambdas.zero_()
        self.gammas.fill_(1 / self.short)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """(m, N r), (N r, n): the sum over i as one product of long factors, so that no stack of N dense matrices is built."""
        scalings = torch.bmm(self.lambdas[:, :, None], self.gammas[:, None])  # (N, r, q); one dense pass backward, as A is constant
        right = (scalings * self.shared.A[:, : self.short]).flatten(0, 1)
        left = self.shared.B[: self.long, : len(right)]
        return (right.mT, left.mT) if self.wide else (left, right)

    def weight(self, W: Tensor) -> Tensor:
        return torch.addmm(W, *self._factors(), alpha=self.scale)

    def factored(self, W: Tensor) -> Factored | None:
        if self.dropout == 0:
            return None  # of full rank: one dense weight gradient is cheaper
        B, A = self._factors()
        return Factored(self.scale * B, A, None, self.dropout)


class RandLoRA(Method):
    """Full-rank adaptation by scaled random bases.

    Args:
        rank: r, of one basis; ceil(min(m, n) / r) bases are used.
        alpha: numerator of the scale; null for 2 r.
        scaling: `sqrt_bases` for alpha / (r sqrt(N)), `rank` for alpha / r.
        basis: distribution of the bases' entries: `uniform`, `normal`, `sparse` (two thirds zeros, else +-1, standardised), or
            `very_sparse` (one entry in sqrt(largest q) is not zero).
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
    """

    kind = "random-basis"
    formula = "N (r + min(m, n)), N = ceil(min(m, n) / r)"
    advice = "LoRA saturates as rank grows and full rank is wanted from a small file."

    def __init__(
        self,
        rank: int = 32,
        alpha: float | None = None,
        scaling: Literal["sqrt_bases", "rank"] = "sqrt_bases",
        basis: Literal["uniform", "normal", "sparse", "very_sparse"] = "uniform",
        dropout: float = 0.0,
    ) -> None:
        if scaling not in ("sqrt_bases", "rank"):
            raise UserError(f"adapter.method.scaling: {scaling!r} is not one of sqrt_bases, rank")
        if basis not in ("uniform", "normal", "sparse", "very_sparse"):
            raise UserError(f"adapter.method.basis: {basis!r} is not one of uniform, normal, sparse, very_sparse")
        self.rank, self.alpha, self.scaling = require_positive("rank", rank), alpha, scaling
        self.basis, self.dropout = basis, require_dropout(dropout)

    def bases(self, short: int) -> int:
        """N for a weight whose short side is q."""
        return math.ceil(short / self.rank)

    def scale(self, bases: int) -> float:
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / self.rank / (math.sqrt(bases) if self.scaling == "sqrt_bases" else 1)

    def shared(self, sites: Sequence[Site]) -> RandomBases:
        short = max(min(site.matrix_shape) for site in sites)
        long = max(max(site.matrix_shape) for site in sites)
        sizes = {"A": Basis((self.rank, short)), "B": Basis((long, self.bases(short) * self.rank))}
        if self.basis in ("uniform", "normal"):
            return RandomBases(sizes, self.basis, exact=True)
        return RandomBases(sizes, "ternary", 3.0 if self.basis == "sparse" else math.sqrt(short), exact=True)

    def adapter(self, site: Site, shared: RandomBases) -> RandLoRAAdapter:
        return RandLoRAAdapter(site, self, shared)

    def count(self, site: Site) -> int:
        short = min(site.matrix_shape)
        return self.bases(short) * (self.rank + short)
