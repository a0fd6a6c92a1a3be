"""LoRA: the update of a weight is a product of two thin matrices.

    y = W x + b + s B A drop(x)        A (r, n), B (m, r), s = alpha / r  or  alpha / sqrt(r)

Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, so W' = W. Trained: A and B, r (m + n) numbers a weight; W and b are frozen.
Kernels are flattened to (out, in/groups * kh * kw). `scaling: sqrt_rank` is the rank-stabilised form (rsLoRA), which the
CLIP few-shot protocol uses with r = 2, alpha = 1, dropout 0.25.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; Kalajdzievski, "A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA", 2023; Zanella and Ben Ayed, CLIP-LoRA, 2024 (code: MaxZanella/CLIP-LoRA).
"""

from __future__ import annotations

from torch import nn

from vision_peft.adapters._low_rank import LowRankAdapter, Scaling, require_dropout, scale_of
from vision_peft.engine.adapter import Method
from vision_peft.engine.site import Site


class LoRA(Method):
    """Low-rank adaptation.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale.
        scaling: `rank` for alpha / r, `sqrt_rank` for alpha / sqrt(r).
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
    """

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
