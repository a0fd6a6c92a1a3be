"""DoRA: LoRA moves the direction of each output neuron's weight, a trained magnitude sets its length.

    W' = diag(mu / nu) (W + s B A),    nu = row norms of W + s B A, taken as constants in the backward pass

A (r, n), B (m, r), mu (m,). Start: A and B as LoRA, mu = row norms of W, so W' = W. Trained: r (m + n) + m numbers a weight.
The row norms come from ||w||^2 + 2 <b A, w> + ||b A||^2, so no dense matrix is built for them. With dropout the branch
alone sees dropped inputs. Rows of W that are zero stay zero.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024; checked against the layer of huggingface/peft.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import LowRankAdapter, Scaling, require_dropout, scale_of
from vision_peft.engine.adapter import Evidence, Factored, Method
from vision_peft.engine.site import Site


class DoRAAdapter(LowRankAdapter):
    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__(site, rank, scale, dropout)
        self.magnitude = nn.Parameter(torch.ones(site.matrix_shape[0]))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        super().initialize(W, evidence)
        self.magnitude.copy_(self._norm(W, self.scale * self.B))

    def factored(self, W: Tensor) -> Factored:
        B = self.scale * self.B
        return Factored(B, self.A, self.magnitude / self._norm(W, B), self.dropout)

    @torch.no_grad()
    def _norm(self, W: Tensor, B: Tensor) -> Tensor:
        """Row norms (m,) of W + B A."""
        cross = (B * (W @ self.A.mT)).sum(1)
        square = (B @ (self.A @ self.A.mT) * B).sum(1)
        return (W.square().sum(1) + 2 * cross + square).clamp(min=1e-24).sqrt()


class DoRA(Method):
    """Weight-decomposed low-rank adaptation.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale.
        scaling: `rank` for alpha / r, `sqrt_rank` for alpha / sqrt(r).
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
    """

    kind = "low-rank"
    formula = "r (m + n) + m"
    advice = "LoRA at a low rank falls short of full fine-tuning; costs little more here."

    def __init__(self, rank: int = 8, alpha: float = 8.0, scaling: Scaling = "rank", dropout: float = 0.0) -> None:
        self.rank, self.alpha, self.scaling, self.dropout = rank, alpha, scaling, require_dropout(dropout)
        self.scale = scale_of(alpha, rank, scaling)

    def adapter(self, site: Site, shared: nn.Module | None) -> DoRAAdapter:
        return DoRAAdapter(site, self.rank, self.scale, self.dropout)

    def count(self, site: Site) -> int:
        return self.rank * sum(site.matrix_shape) + site.matrix_shape[0]
