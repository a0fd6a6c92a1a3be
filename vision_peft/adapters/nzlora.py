"""NZLoRA: LoRA whose factors are both random and non-zero at the start, which makes it less sensitive to a small learning rate.

    W' = W + s (B A - B0 A0),    A0 ~ U(-sqrt(c_A / n), sqrt(c_A / n)),  B0 ~ U(-sqrt(c_B / n), sqrt(c_B / n))

Start: A = A0 (r, n), B = B0 (m, r); hence W' = W. Both bounds take the width n of the input. Trained: A and B, r (m + n) numbers a
weight; A0 and B0 are frozen, and drawn anew from the seed on load. `offset: false` leaves the noise s B0 A0 in the weight, which
the paper found to do no harm: fine-tuning need not start at the pretrained network.

Why: with B = 0 the first step moves B only, by the learning rate, and A by the product of two small numbers. With B as large
as A the first steps move both.

Source: Li et al., "Beyond Zero Initialization: Investigating the Impact of Non-Zero Initialization on LoRA Fine-Tuning Dynamics",
ICML 2025, arXiv 2505.23194; read in the code of hhnqqq/MyTransformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vision_peft.adapters._lora_like import LoRALike
from vision_peft.adapters._low_rank import Scaling
from vision_peft.adapters._started import StartedAdapter
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class NZLoRAAdapter(StartedAdapter):
    def __init__(self, site: Site, method: NZLoRA) -> None:
        super().__init__(site, method.rank, method.scale, method.dropout, offset=method.offset)
        self.spread_A, self.spread_B = method.spread_A, method.spread_B

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        def draw(like: Tensor, spread: float) -> Tensor:
            uniform = torch.rand(like.shape, generator=evidence.generator, dtype=torch.float32)
            return (2 * uniform - 1) * math.sqrt(spread / W.shape[1])

        A = draw(self.A, self.spread_A)
        self.start_at(draw(self.B, self.spread_B), A)


class NZLoRA(LoRALike):
    """Non-zero initialised LoRA.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale.
        scaling: `rank` for alpha / r, `sqrt_rank` for alpha / sqrt(r).
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
        spread_A: c_A, positive; 1 is LoRA's start of A.
        spread_B: c_B, positive.
        offset: subtract the start, so that training begins at the pretrained network.
    """

    advice = "LoRA's stalled first steps are the problem: both factors start away from zero."

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 8.0,
        scaling: Scaling = "rank",
        dropout: float = 0.0,
        spread_A: float = 1.0,
        spread_B: float = 1.0,
        offset: bool = True,
    ) -> None:
        super().__init__(rank, alpha, scaling, dropout)
        for key, value in (("spread_A", spread_A), ("spread_B", spread_B)):
            if not value > 0:
                raise UserError(f"adapter.method.{key}: {value} is not positive")
        self.spread_A, self.spread_B, self.offset = spread_A, spread_B, offset
        self.identity_at_init = offset

    def adapter(self, site: Site, shared: nn.Module | None) -> NZLoRAAdapter:
        return NZLoRAAdapter(site, self)
