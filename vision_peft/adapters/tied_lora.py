"""Tied-LoRA: all layers are tied to one pair of factors, and each rescales the pair by two vectors of its own.

    W' = W + s diag(v) B diag(u) A        A (r, n), B (m, r) shared and trained;  u (r,), v (m,) of the layer;  s = alpha / r

It is the form of VeRA with A and B trained. The pair is as wide as the widest and as tall as the tallest adapted layer; a narrower
layer takes the first columns of A and the first rows of B. Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, u = v = 1, so W' = W.
Trained: m + r numbers a weight, and r (largest m + largest n) once.

Source: Renduchintala, Konuk and Kuchaiev, "Tied-LoRA: Enhancing Parameter Efficiency of LoRA with Weight Tying", NAACL 2024;
reconstructed from a summary, in the form in which everything is trained (the paper freezes parts in others); the start is this
project's choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import Scaling, require_dropout, require_rank, scale_of
from vision_peft.adapters._shared_factors import SharedFactors
from vision_peft.engine.adapter import Evidence, Factored, FactoredAdapter, Method
from vision_peft.engine.site import Site


class TiedLoRAAdapter(FactoredAdapter):
    shared: SharedFactors

    def __init__(self, site: Site, method: TiedLoRA, shared: SharedFactors) -> None:
        super().__init__()
        out, _ = require_rank(site, method.rank)
        self.scale, self.dropout = method.scale, method.dropout
        object.__setattr__(self, "shared", shared)  # no child: saved and trained once, not with every adapter
        self.u = nn.Parameter(torch.ones(method.rank))
        self.v = nn.Parameter(torch.ones(out))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.u.fill_(1.0)
        self.v.fill_(1.0)

    def factored(self, W: Tensor) -> Factored:
        B = self.scale * self.v[:, None] * self.shared.up(W.shape[0]) * self.u
        return Factored(B, self.shared.down(W.shape[1]), None, self.dropout)


class TiedLoRA(Method):
    """LoRA with tied factors.

    Args:
        rank: r, 1 to the smallest side of an adapted layer.
        alpha, scaling, dropout: as LoRA.
    """

    low_rank = True
    kind = "low-rank"
    source = "abstract"
    formula = "m + r, beside the shared pair"
    advice = "the smallest LoRA: one pair for all layers."

    def __init__(self, rank: int = 8, alpha: float = 8.0, scaling: Scaling = "rank", dropout: float = 0.0) -> None:
        self.rank, self.alpha, self.scaling, self.dropout = rank, alpha, scaling, require_dropout(dropout)
        self.scale = scale_of(alpha, rank, scaling)

    def shared(self, sites: Sequence[Site]) -> SharedFactors:
        return SharedFactors(sites, self.rank)

    def adapter(self, site: Site, shared: SharedFactors) -> TiedLoRAAdapter:
        return TiedLoRAAdapter(site, self, shared)

    def count(self, site: Site) -> int:
        return site.matrix_shape[0] + self.rank
