"""LoRA's map and LoRA's arguments, for methods that differ in how the factors are trained."""

from __future__ import annotations

from torch import nn

from vision_peft.adapters._low_rank import LowRankAdapter, Scaling, require_dropout, scale_of
from vision_peft.engine.adapter import Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class LoRALike(Method):
    """W' = W + s B A with both factors trained; a subclass adds its own arguments and hooks."""

    low_rank = True
    kind = "low-rank"
    formula = "r (m + n)"

    def __init__(self, rank: int = 8, alpha: float = 8.0, scaling: Scaling = "rank", dropout: float = 0.0) -> None:
        self.rank, self.alpha, self.scaling, self.dropout = rank, alpha, scaling, require_dropout(dropout)
        self.scale = scale_of(alpha, rank, scaling)

    def adapter(self, site: Site, shared: nn.Module | None) -> LowRankAdapter:
        return LowRankAdapter(site, self.rank, self.scale, self.dropout)

    def count(self, site: Site) -> int:
        return self.rank * sum(site.matrix_shape)


def require_alpha(alpha: float) -> float:
    """alpha, where a method divides by the scale; UserError for 0 and below."""
    if not alpha > 0:
        raise UserError(f"adapter.method.alpha: {alpha} is not positive")
    return alpha
