"""PRoLoRA: most of both factors is one small chunk, repeated along the layer's width and rotated a little further each time.

    W' = W + s B A,    A = [A_u; (A_c, R A_c, R^2 A_c, ...)],    B = [B_u, (B_c; B_c R'^T; B_c R'^2T; ...)],    s = alpha / r

A_u (u, n) and B_u (m, u) are LoRA's, unshared. The shared r - u ranks have chunks A_c (r - u, n / p) and B_c (m / q, r - u), repeated p and
q times; R turns the ranks of a chunk by max(1, (r - u) / p) places, R' by max(1, (r - u) / q), so that the copies differ. Widths that p
or q does not divide: the chunk is rounded up and the last copy cut. Start: A_u, A_c ~ U(-1/sqrt(n), 1/sqrt(n)) with the whole n (the
rectified start), B_u = B_c = 0, so W' = W. Trained: u (m + n) + (r - u)(n / p + m / q) numbers a weight.

Source: Wang et al., "PRoLoRA: Partial Rotation Empowers More Parameter-Efficient LoRA", ACL 2024; read in the authors' code
(Forence1999/PRoLoRA), which turns the ranks; hhnqqq/MyTransformers shifts the columns of a chunk instead. The defaults of u, p and q
are this project's choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_dropout, require_rank, scale_of
from vision_peft.engine.adapter import Evidence, Factored, FactoredAdapter, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class ProLoRAAdapter(FactoredAdapter):
    A_u: nn.Parameter | None
    B_u: nn.Parameter | None
    turns_in: Tensor  # (r - u, p): which rank of the chunk each rank of each copy is
    turns_out: Tensor  # (r - u, q)

    def __init__(self, site: Site, method: ProLoRA) -> None:
        super().__init__()
        out, columns = require_rank(site, method.rank)
        own, common = method.unshared_rank, method.rank - method.unshared_rank
        self.scale, self.dropout = method.scale, method.dropout
        self.A_c = nn.Parameter(torch.zeros(common, math.ceil(columns / method.repeats_in)))
        self.B_c = nn.Parameter(torch.zeros(math.ceil(out / method.repeats_out), common))
        self.A_u = nn.Parameter(torch.zeros(own, columns)) if own else None
        self.B_u = nn.Parameter(torch.zeros(out, own)) if own else None
        self.register_buffer("turns_in", _turns(common, method.repeats_in), persistent=False)
        self.register_buffer("turns_out", _turns(common, method.repeats_out), persistent=False)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        bound = 1 / math.sqrt(W.shape[1])
        for down in (self.A_c, self.A_u):
            if down is not None:
                down.copy_(torch.rand(down.shape, generator=evidence.generator) * (2 * bound) - bound)
        for up in (self.B_c, self.B_u):
            if up is not None:
                up.zero_()

    def factored(self, W: Tensor) -> Factored:
        out, columns = W.shape
        A = self.A_c[self.turns_in].flatten(1)[:, :columns]  # (r - u, p, n / p) side by side
        B = self.B_c[:, self.turns_out].permute(2, 0, 1).flatten(0, 1)[:out]  # (q, m / q, r - u) below each other
        if self.A_u is not None:
            A, B = torch.cat([self.A_u, A]), torch.cat([self.B_u, B], dim=1)
        return Factored(self.scale * B, A, None, self.dropout)


class ProLoRA(Method):
    """Partially rotated LoRA.

    Args:
        rank: r, shared and unshared together.
        unshared_rank: u ranks that are LoRA's own, 0 to r - 1.
        repeats_in: p copies that make up A.
        repeats_out: q copies that make up B.
        alpha: numerator of the scale alpha / r.
        dropout: as LoRA.
    """

    low_rank = True
    kind = "low-rank"
    formula = "u (m + n) + (r - u)(n / p + m / q)"
    advice = "LoRA's numbers should be halved by sharing within a layer."
    tiny = {"rank": 4, "unshared_rank": 1, "repeats_in": 2, "repeats_out": 2}  # a rank of 2 has one shared rank: nothing to turn

    def __init__(
        self,
        rank: int = 8,
        unshared_rank: int = 2,
        repeats_in: int = 4,
        repeats_out: int = 4,
        alpha: float = 8.0,
        dropout: float = 0.0,
    ) -> None:
        self.scale = scale_of(alpha, rank, "rank")
        if not 0 <= unshared_rank < rank:
            raise UserError(f"adapter.method.unshared_rank: {unshared_rank} is not between 0 and rank - 1 = {rank - 1}")
        for key, repeats in (("repeats_in", repeats_in), ("repeats_out", repeats_out)):
            if repeats < 1:
                raise UserError(f"adapter.method.{key}: {repeats} is not positive")
        self.rank, self.unshared_rank, self.repeats_in, self.repeats_out = rank, unshared_rank, repeats_in, repeats_out
        self.alpha, self.dropout = alpha, require_dropout(dropout)

    def adapter(self, site: Site, shared: nn.Module | None) -> ProLoRAAdapter:
        return ProLoRAAdapter(site, self)

    def count(self, site: Site) -> int:
        out, columns = site.matrix_shape
        chunks = math.ceil(columns / self.repeats_in) + math.ceil(out / self.repeats_out)
        return self.unshared_rank * (out + columns) + (self.rank - self.unshared_rank) * chunks


def _turns(ranks: int, repeats: int) -> Tensor:
    step = max(1, ranks // repeats)
    return (torch.arange(ranks)[:, None] + step * torch.arange(repeats)) % ranks
