"""Block-LoRA: LoRA in block form whose down-projection blocks are one shared block ("one head, eight arms").

    W' = W + s (B_1 + ... + B_N) A_s,    A_s (r/N, n), B_i (m, r/N), s = alpha / sqrt(r)

Start: A_s ~ U(-1/sqrt(n), 1/sqrt(n)), all B_i = 0, so W' = W. Trained: r n / N + r m numbers a weight. The arms are summed first,
so the products have width r/N. All arms receive the same gradient and start equal, so they stay equal: the function class is
LoRA of rank r/N, with an up-projection that moves N times as far per Adam step.

Source: "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning", arXiv 2501.16720;
reconstructed from the abstract: the scale with the nominal r and the defaults r = N = 2 are this project's choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import Scaling, require_dropout, require_rank, scale_of
from vision_peft.engine.adapter import Evidence, Factored, FactoredAdapter, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_


class BlockLoRAAdapter(FactoredAdapter):
    def __init__(self, site: Site, rank: int, blocks: int, scale: float, dropout: float) -> None:
        super().__init__()
        width = rank // blocks
        out, columns = require_rank(site, width)
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.zeros(width, columns))
        self.arms = nn.Parameter(torch.zeros(blocks, out, width))  # one tensor: N separate ones slow the optimizer

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        kaiming_rows_(self.A, evidence.generator)
        self.arms.zero_()

    def factored(self, W: Tensor) -> Factored:
        return Factored(self.scale * self.arms.sum(0), self.A, None, self.dropout)


class BlockLoRA(Method):
    """Block-matrix LoRA.

    Args:
        rank: nominal r, a multiple of `blocks`.
        blocks: N arms; 1 is plain LoRA with the same scale.
        alpha, scaling, dropout: as LoRA; the defaults are the CLIP few-shot protocol's.
    """

    low_rank = True
    kind = "low-rank"
    source = "abstract"
    formula = "r n / N + r m"
    advice = "CLIP few-shot at LoRA's accuracy with fewer numbers."

    def __init__(
        self, rank: int = 2, blocks: int = 2, alpha: float = 1.0, scaling: Scaling = "sqrt_rank", dropout: float = 0.25
    ) -> None:
        if blocks < 1 or rank % blocks:
            raise UserError(f"adapter.method.blocks: {blocks} does not divide the rank {rank}")
        self.rank, self.blocks, self.alpha, self.scaling, self.dropout = rank, blocks, alpha, scaling, require_dropout(dropout)
        self.scale = scale_of(alpha, rank, scaling)

    def adapter(self, site: Site, shared: nn.Module | None) -> BlockLoRAAdapter:
        return BlockLoRAAdapter(site, self.rank, self.blocks, self.scale, self.dropout)

    def count(self, site: Site) -> int:
        out, columns = site.matrix_shape
        return self.rank // self.blocks * columns + self.rank * out
