"""ShareLoRA: all layers share one down-projection, or one up-projection, or both; the rest is LoRA.

    W' = W + s B A,    A (r, n), B (m, r), s = alpha / r;    `share: A` is the paper's main form: one A for all layers, a B for each

What is shared is one trained matrix as wide as the widest and as tall as the tallest adapted layer; a narrower layer takes its first
columns or rows. With `share: both` every layer gets the same update, as far as its size allows.
Start: A ~ U(-1/sqrt(n), 1/sqrt(n)) with the n of the tensor that is drawn, B = 0, so W' = W. Trained: r m numbers a weight (A shared),
r n (B shared) or none (both), and r largest n, r largest m, or both of these once.

Source: Song et al., "ShareLoRA: Parameter Efficient and Robust Large Language Model Fine-tuning via Shared Low-Rank Adaptation", 2024;
read in the code of hhnqqq/MyTransformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import Scaling, require_dropout, require_rank, scale_of
from vision_peft.adapters._shared_factors import SharedFactors
from vision_peft.engine.adapter import Evidence, Factored, FactoredAdapter, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_

Share = Literal["A", "B", "both"]


class ShareLoRAAdapter(FactoredAdapter):
    shared: SharedFactors
    A: nn.Parameter | None
    B: nn.Parameter | None

    def __init__(self, site: Site, method: ShareLoRA, shared: SharedFactors) -> None:
        super().__init__()
        out, columns = require_rank(site, method.rank)
        self.scale, self.dropout = method.scale, method.dropout
        object.__setattr__(self, "shared", shared)  # no child: saved and trained once, not with every adapter
        self.A = nn.Parameter(torch.zeros(method.rank, columns)) if method.share == "B" else None
        self.B = nn.Parameter(torch.zeros(out, method.rank)) if method.share == "A" else None

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        if self.A is not None:
            kaiming_rows_(self.A, evidence.generator)
        if self.B is not None:
            self.B.zero_()

    def factored(self, W: Tensor) -> Factored:
        A = self.shared.down(W.shape[1]) if self.A is None else self.A
        B = self.shared.up(W.shape[0]) if self.B is None else self.B
        return Factored(self.scale * B, A, None, self.dropout)


class ShareLoRA(Method):
    """LoRA with factors shared by all layers.

    Args:
        rank: r, 1 to the smallest side of an adapted layer.
        share: which factor is common to all layers.
        alpha, scaling, dropout: as LoRA.
    """

    low_rank = True
    kind = "low-rank"
    formula = "r m (share A), r n (share B) or 0, beside the shared ones"
    advice = "LoRA's file should shrink by sharing one factor among all layers."

    def __init__(
        self, rank: int = 8, share: Share = "A", alpha: float = 8.0, scaling: Scaling = "rank", dropout: float = 0.0
    ) -> None:
        if share not in ("A", "B", "both"):
            raise UserError(f"adapter.method.share: {share!r} is not one of A, B, both")
        self.rank, self.share, self.alpha, self.scaling, self.dropout = rank, share, alpha, scaling, require_dropout(dropout)
        self.scale = scale_of(alpha, rank, scaling)

    def shared(self, sites: Sequence[Site]) -> SharedFactors:
        return SharedFactors(sites, self.rank, share_a=self.share != "B", share_b=self.share != "A")

    def adapter(self, site: Site, shared: SharedFactors) -> ShareLoRAAdapter:
        return ShareLoRAAdapter(site, self, shared)

    def count(self, site: Site) -> int:
        out, columns = site.matrix_shape
        return self.rank * {"A": out, "B": columns, "both": 0}[self.share]
