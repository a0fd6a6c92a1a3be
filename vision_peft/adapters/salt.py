"""SALT: leading singular values are scaled and shifted, the trailing ones get a low-rank term, and ReLU keeps what is positive.

    W' = U ReLU(S') V^T,    S' = blockdiag(diag(a * s_r + b), diag(s_t) + X Y),    W = U diag(s) V^T

p = min(m, n); s_r (r,) the leading and s_t (p - r,) the trailing singular values; a (r,), b (r,), X (p - r, q), Y (q, p - r) trained:
2 r + 2 q (p - r) numbers a weight; U, s, V frozen, recomputed from W on load. ReLU acts on every entry of S', also off the diagonal.
Start: a = 1, b = 0, and X ~ U(-sqrt(6 / q), sqrt(6 / q)), Y = 0 (the layers for SAM 2), so W' = W; or X, Y ~ N(0, 0.01^2) (the layers for
SAM 1), which already changes the network. W' is computed as W + U (ReLU(S') - diag(s)) V^T, which is W itself at the start.
Penalty of a layer: weight * (||a s_r + b - s_r|| + ||X Y||_F), with the released weight 0.

X Y couples singular directions, so the sign of each pair (u, v) matters: it is fixed by a rule, and the fingerprint sees signs.

Source: "SALT: Singular Value Adaptation with Low-Rank Transformation", BMVC 2025, arXiv 2503.16055; code: BioMedIA-MBZUAI/SALT.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.svd import basis_mark
from vision_peft.linalg.svd_cache import cached_svd

Start = Literal["zero", "normal"]


class SALTAdapter(Adapter):
    U: Tensor  # (m, p)
    S: Tensor  # (p,)
    Vh: Tensor  # (p, n)

    def __init__(self, site: Site, method: SALT) -> None:
        super().__init__()
        self.rank, self.start, self.penalty_weight = method.rank_of(site), method.start, method.penalty_weight
        tail = min(site.matrix_shape) - self.rank
        self.a = nn.Parameter(torch.ones(self.rank))
        self.b = nn.Parameter(torch.zeros(self.rank))
        # nothing trails where all values are scaled: an empty tensor could not be trained
        self.X = nn.Parameter(torch.zeros(tail, method.tail_rank)) if tail else None
        self.Y = nn.Parameter(torch.zeros(method.tail_rank, tail)) if tail else None
        for name in ("U", "S", "Vh"):
            self.register_buffer(name, None, persistent=False)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        U, self.S, Vh = cached_svd(W)
        signs = torch.where(_wave(1.3, U) @ U < 0, -1.0, 1.0).to(U.dtype)  # (p,)
        self.U, self.Vh = U * signs, Vh * signs[:, None]
        self.a.fill_(1.0)
        self.b.zero_()
        if self.X is None:
            return
        if self.start == "zero":
            bound = math.sqrt(6 / self.X.shape[1])  # Kaiming's uniform start with the gain of ReLU
            self.X.copy_(torch.rand(self.X.shape, generator=evidence.generator) * (2 * bound) - bound)
            self.Y.zero_()
        else:
            for factor in (self.X, self.Y):
                factor.copy_(0.01 * torch.randn(factor.shape, generator=evidence.generator))

    def weight(self, W: Tensor) -> Tensor:
        r, s = self.rank, self.S
        change = ((self.a * s[:r] + self.b).relu() - s[:r])[:, None] * self.Vh[:r]  # (r, n)
        if self.X is not None:
            values = torch.diag(s[r:])
            change = torch.cat([change, ((values + self.X @ self.Y).relu() - values) @ self.Vh[r:]])  # (p, n)
        return torch.addmm(W, self.U, change)

    def penalty(self) -> Tensor | float:
        if not self.penalty_weight:
            return 0.0
        s = self.S[: self.rank]
        size = torch.linalg.vector_norm(self.a * s + self.b - s)
        if self.X is not None:
            size = size + torch.linalg.vector_norm(self.X @ self.Y)
        return self.penalty_weight * size

    def fingerprint(self) -> Tensor:
        order = torch.arange(self.U.shape[1], device=self.U.device)
        weights = 1 + 0.5 * torch.cos(2.4 * order)
        signed = torch.stack([(_wave(f, self.U) @ self.U) @ weights.to(self.U.dtype) for f in (0.7, 1.1, 2.3)])  # change with any sign
        return torch.cat([basis_mark(self.U, self.Vh), signed])


class SALT(Method):
    """Scaled and shifted leading singular values, low-rank term on the rest.

    Args:
        rank: r, leading singular values that are scaled and shifted, 0 < r <= min(m, n); null takes `ratio`.
        ratio: r as a share of the singular values, rounded down, at least one; in (0, 1].
        ranks: r by a pattern over layer names, before `rank` and `ratio`; the paper's SAM ViT-B has
            {"*attn*": 760, "*mlp*": 50, "*neck*": 250}.
        tail_rank: q, of the term on the trailing values; may exceed their number.
        start: `zero` (Y = 0, the identity) or `normal` (X and Y small normal, not the identity).
        penalty_weight: weight of the penalty.
    """

    kind = "svd"
    formula = "2 r + 2 q (min(m, n) - r)"
    advice = "segmentation and other domains far from pre-training: scales, shifts and a low-rank tail of the spectrum."
    tiny = {"tail_rank": 2}

    def __init__(
        self,
        rank: int | None = None,
        ratio: float = 0.1,
        ranks: dict[str, int] | None = None,
        tail_rank: int = 256,
        start: Start = "zero",
        penalty_weight: float = 0.0,
    ) -> None:
        if not 0 < ratio <= 1:
            raise UserError(f"adapter.method.ratio: {ratio} is not in (0, 1]")
        if tail_rank < 1:
            raise UserError(f"adapter.method.tail_rank: {tail_rank} is not positive")
        if start not in ("zero", "normal"):
            raise UserError(f"adapter.method.start: {start!r} is not one of zero, normal")
        if penalty_weight < 0:
            raise UserError(f"adapter.method.penalty_weight: {penalty_weight} is negative")
        self.rank, self.ratio, self.ranks, self.tail_rank = rank, ratio, ranks, tail_rank
        self.start, self.penalty_weight = start, penalty_weight
        self.identity_at_init = start == "zero"

    def rank_of(self, site: Site) -> int:
        """r for a site; UserError where it does not fit."""
        p = min(site.matrix_shape)
        pattern = next((each for each in self.ranks or {} if fnmatchcase(site.target, each)), None)
        key, rank = ("rank", self.rank) if pattern is None else (f"ranks.{pattern}", self.ranks[pattern])
        if rank is None:
            return max(1, int(p * self.ratio))
        if not 1 <= rank <= p:
            raise UserError(f"adapter.method.{key}: {rank} does not fit {site.name}, which has {p} singular values")
        return rank

    def adapter(self, site: Site, shared: nn.Module | None) -> SALTAdapter:
        return SALTAdapter(site, self)

    def count(self, site: Site) -> int:
        r = self.rank_of(site)
        return 2 * r + 2 * self.tail_rank * (min(site.matrix_shape) - r)


def _wave(frequency: float, like: Tensor) -> Tensor:
    """A vector (m,) that no structure of W is likely to be orthogonal to."""
    return torch.cos(frequency * torch.arange(like.shape[0], device=like.device, dtype=like.dtype) + 0.4)
