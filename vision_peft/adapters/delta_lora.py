"""Delta-LoRA: LoRA whose steps are also added to the pretrained weight itself.

    y = (W_t + s B_t A_t) x,    W_t+1 = W_t + rho s (B_t+1 A_t+1 - B_t A_t)   after every step from step K on

A (r, n), B (m, r). The sum of the steps telescopes, so the weight is not rewritten; what it has gained is

    W' = W + s B A + rho s (B A - B_K A_K),    B_K, A_K as they were after step K, kept as buffers

and has rank 2 r at most. In the backward pass W_t is a constant, as in the paper: the gradients of A and B are LoRA's, not 1 + rho
times as large. Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, so W' = W. Trained: A and B, r (m + n) numbers a weight. There is no
dropout, which would separate the gradient of the branch from that of the weight.

Source: Zi et al., "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices", arXiv 2309.02411; read in the code
of hhnqqq/MyTransformers. The defaults of rank and alpha are LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vision_peft.adapters._lora_like import LoRALike
from vision_peft.adapters._low_rank import LowRankAdapter, Scaling
from vision_peft.engine.adapter import Adapter, Clock, Evidence, Factored, Shared
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class DeltaLoRAAdapter(LowRankAdapter):
    begun: Tensor  # (), 1 from step K on
    A_start: Tensor  # (r, n)
    B_start: Tensor  # (m, r)

    def __init__(self, site: Site, method: DeltaLoRA) -> None:
        super().__init__(site, method.rank, method.scale, 0.0)
        self.rho, self.at_once = method.rho, method.start == 0
        self.register_buffer("begun", torch.zeros(()))
        self.register_buffer("A_start", torch.zeros_like(self.A))
        self.register_buffer("B_start", torch.zeros_like(self.B))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        super().initialize(W, evidence)
        if self.at_once:
            self.begin()

    def begin(self) -> None:
        self.begun.fill_(1)
        self.A_start.copy_(self.A)
        self.B_start.copy_(self.B)

    def factored(self, W: Tensor) -> Factored:
        gain = self.rho * self.begun
        # (1 + gain) s B A with the gradients of s B A: the part of W_t is held constant without columns of its own
        A = (self.A + gain * self.A.detach()) / (1 + gain)
        B = self.scale * (self.B + gain * self.B.detach())
        return Factored(torch.cat([B, -self.scale * gain * self.B_start], 1), torch.cat([A, self.A_start]), trained=A.shape[0])


class DeltaLoRA(LoRALike):
    """LoRA that updates the weight by the change of its product.

    Args:
        rank: r, 1 to min(m, n).
        alpha, scaling: as LoRA.
        rho: how much of every change the weight takes; 0 is LoRA.
        start: K, the optimizer step after which the weight follows.
    """

    advice = "runs are long and a plain LoRA stays behind full fine-tuning."
    tiny = {"start": 1}

    def __init__(self, rank: int = 8, alpha: float = 8.0, scaling: Scaling = "rank", rho: float = 2.0, start: int = 500) -> None:
        if not rho >= 0:
            raise UserError(f"adapter.method.rho: {rho} is negative")
        if start < 0:
            raise UserError(f"adapter.method.start: {start} is negative")
        super().__init__(rank, alpha, scaling)
        self.rho, self.start = rho, start

    def adapter(self, site: Site, shared: nn.Module | None) -> DeltaLoRAAdapter:
        return DeltaLoRAAdapter(site, self)

    def coordinate(self, adapters: Mapping[str, Adapter], shared: Shared | None, clock: Clock) -> None:
        for adapter in adapters.values():
            if clock.step >= self.start and not adapter.begun:
                adapter.begin()
