"""What the members of the LoRA family share: the pair of factors, its start, its scale, its dropout."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Evidence, Factored, FactoredAdapter
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_

Scaling = Literal["rank", "sqrt_rank"]


class LowRankAdapter(FactoredAdapter):
    """W' = W + s B A with A (r, in) ~ U(-1/sqrt(in), 1/sqrt(in)) and B (out, r) = 0."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        out, columns = require_rank(site, rank)
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.zeros(rank, columns))
        self.B = nn.Parameter(torch.zeros(out, rank))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        kaiming_rows_(self.A, evidence.generator)
        self.B.zero_()

    def factored(self, W: Tensor) -> Factored:
        return Factored(self.scale * self.B, self.A, None, self.dropout)


def require_rank(site: Site, rank: int) -> tuple[int, int]:
    """(out, in) of the site; UserError where a matrix of that rank does not fit it."""
    out, columns = site.matrix_shape
    if not 1 <= rank <= min(out, columns):
        raise UserError(f"adapter.method.rank: {rank} does not fit {site.name}, a {out} x {columns} matrix (1 to {min(out, columns)})")
    return out, columns


def scale_of(alpha: float, rank: int, scaling: Scaling) -> float:
    """alpha / r (LoRA) or alpha / sqrt(r) (rank-stabilised)."""
    if scaling not in ("rank", "sqrt_rank"):
        raise UserError(f"adapter.method.scaling: {scaling!r} is not one of rank, sqrt_rank")
    if rank < 1:
        raise UserError(f"adapter.method.rank: {rank} is not positive")
    return alpha / (rank if scaling == "rank" else math.sqrt(rank))


def require_dropout(dropout: float) -> float:
    """The dropout probability; UserError outside [0, 1)."""
    if not 0 <= dropout < 1:
        raise UserError(f"adapter.method.dropout: {dropout} is not in [0, 1)")
    return dropout
