"""GoRA: LoRA whose ranks and start both come from the gradient: more ranks for weights that matter, and a first step downhill.

    W' = W + s_k B A,    s_k = alpha / sqrt(k),  G the mean gradient of the loss in W over calibration batches

Ranks: a weight matters by I = mean |W * G| (entry by entry). It gets the share I / sum I of a budget of r (m + n) numbers a weight,
summed over all weights, hence k = share * budget / (m + n) ranks, rounded down and kept within `min_rank` and `max_rank`. A holds
R = min(max_rank, m, n) rows and B as many columns, of which k act; the rest is masked, so R (m + n) numbers a weight are held and an
export has k.

Start: A (k, n) ~ U(-1/sqrt(n), 1/sqrt(n)), and B the best the span of A can do for the negative gradient,

    B = -c G A^T (A A^T)^-1,    c = (gamma / s_k) sqrt(n / k),    so that  s_k B A = -gamma sqrt(n / k) G P

with P the orthogonal projector on the row space of A. The root makes up for what P takes away: the start is about as large as a step
-gamma G, and the loss falls to first order. The network is thus not the frozen one before training; `offset: true` subtracts the start,
W' = W + s_k (B A - B0 A0), and gives up the step. A and B are trained; W is frozen; A0 and B0 are stored. Where the gradient is zero, B is.

Source: He et al., "GoRA: Gradient-driven Adaptive Low Rank Adaptation", NeurIPS 2025, arXiv 2502.12171 (code: hhnqqq/MyTransformers,
read; of the paper the abstract). The code sets B = +c G A^T (A A^T)^-1, a step uphill, although it measures its error against -gamma G:
the sign is mended here. Defaults are those of its scripts, with min_rank and max_rank as multiples of r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vision_peft.adapters._lora_like import LoRALike, require_alpha
from vision_peft.adapters._low_rank import Scaling, require_rank, scale_of
from vision_peft.adapters._started import RankedAdapter
from vision_peft.engine.adapter import Adapter, Evidence, Factored, Shared
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_


class GoRAAdapter(RankedAdapter):
    importance: Tensor  # (): mean |W * G|

    def __init__(self, site: Site, rank: int, method: GoRA) -> None:
        super().__init__(site, rank, 1.0, method.dropout, offset=method.offset)
        self.alpha, self.scaling, self.gamma = method.alpha, method.scaling, method.gamma
        self.register_buffer("importance", torch.zeros(()))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        kaiming_rows_(self.A, evidence.generator)
        self.B.zero_()
        if evidence.gradient is not None:
            self.importance.copy_((W * evidence.gradient).abs().mean())
            self.B.copy_(evidence.gradient.to(W) @ self.A.mT)  # G A^T, from which settle() makes the start for any number of ranks

    def settle(self, k: int) -> None:
        """Keep k ranks and start at the step they can make."""
        self.keep(k)
        A = self.A[:k].double()
        size = self.gamma * math.sqrt(A.shape[1] / k) / scale_of(self.alpha, k, self.scaling)
        B = torch.zeros_like(self.B)
        B[:, :k] = -size * torch.linalg.solve(A @ A.mT, self.B[:, :k].double().mT).mT
        self.start_at(B, self.A.clone())

    def factored(self, W: Tensor) -> Factored:
        form = super().factored(W)
        k = self.mask.sum()
        return form._replace(B=form.B * (self.alpha / (k if self.scaling == "rank" else k.sqrt())))


class GoRA(LoRALike):
    """Gradient-driven adaptive low-rank adaptation.

    Args:
        rank: r, of the budget.
        alpha: numerator of the scale.
        scaling: `rank` for alpha / k, `sqrt_rank` for alpha / sqrt(k), k the ranks of the weight.
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
        gamma: size of the first step, as of a learning rate; positive.
        min_rank: ranks every weight gets, as far as it has them; null for half of r, 1 at least.
        max_rank: ranks no weight gets more of; null for four times r.
        offset: subtract the start, so that training begins at the pretrained network.
    """

    evidence = ("gradient",)
    identity_at_init = False
    formula = "R (m + n), R = min(max_rank, m, n)"
    advice = "one calibration pass may decide both ranks and start."

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        scaling: Scaling = "sqrt_rank",
        dropout: float = 0.0,
        gamma: float = 0.05,
        min_rank: int | None = None,
        max_rank: int | None = None,
        offset: bool = False,
    ) -> None:
        super().__init__(rank, require_alpha(alpha), scaling, dropout)
        if not gamma > 0:
            raise UserError(f"adapter.method.gamma: {gamma} is not positive")
        if min_rank is not None and not 1 <= min_rank <= rank:
            raise UserError(f"adapter.method.min_rank: {min_rank} is not within 1 and the rank, {rank}")
        if max_rank is not None and max_rank < rank:
            raise UserError(f"adapter.method.max_rank: {max_rank} is less than the rank, {rank}")
        self.gamma, self.min_rank, self.max_rank, self.offset = gamma, min_rank, max_rank, offset
        self.identity_at_init = offset

    def largest(self, site: Site) -> int:
        """R."""
        return min(4 * self.rank if self.max_rank is None else self.max_rank, *require_rank(site, self.rank))

    def adapter(self, site: Site, shared: nn.Module | None) -> GoRAAdapter:
        return GoRAAdapter(site, self.largest(site), self)

    def allocate(self, adapters: Mapping[str, Adapter], shared: Shared | None) -> None:
        widths = [each.A.shape[1] + each.B.shape[0] for each in adapters.values()]
        total = sum(float(each.importance) for each in adapters.values())
        least = max(1, self.rank // 2) if self.min_rank is None else self.min_rank
        for each, width in zip(adapters.values(), widths):
            share = float(each.importance) / total if total > 0 else width / sum(widths)
            wanted = round(share * self.rank * sum(widths)) // width
            each.settle(min(max(wanted, least), each.mask.numel()))

    def count(self, site: Site) -> int:
        return self.largest(site) * sum(site.matrix_shape)
