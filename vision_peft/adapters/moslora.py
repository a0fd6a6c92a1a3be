"""MoSLoRA: LoRA with a trained square matrix between its factors, which mixes the r subspaces with one another.

    W' = W + s B M A,    A (r, n), M (r, r), B (m, r), s = alpha / r

LoRA is the sum of r pairs b_k a_k; with M every b_j meets every a_k. Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, so W' = W; M by
choice. Trained: r (m + n) + r^2 numbers a weight; W is frozen. The functions are those of LoRA of rank r, the way there is another.

Source: Wu et al., "Mixture-of-Subspaces in Low-Rank Adaptation", EMNLP 2024; read in the code (wutaiqiang/MoSLoRA and
hhnqqq/MyTransformers). The default alpha is LoRA's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._lora_like import LoRALike
from vision_peft.adapters._low_rank import LowRankAdapter, Scaling
from vision_peft.engine.adapter import Evidence, Factored
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_

Mixer = Literal["kaiming", "orthogonal", "identity"]


class MoSLoRAAdapter(LowRankAdapter):
    def __init__(self, site: Site, method: MoSLoRA) -> None:
        super().__init__(site, method.rank, method.scale, method.dropout)
        self.mixer = method.mixer
        self.M = nn.Parameter(torch.eye(method.rank))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        super().initialize(W, evidence)
        if self.mixer == "kaiming":
            kaiming_rows_(self.M, evidence.generator)
        elif self.mixer == "orthogonal":
            self.M.copy_(torch.linalg.qr(torch.randn(self.M.shape, generator=evidence.generator))[0])
        else:
            self.M.copy_(torch.eye(self.M.shape[0]))

    def factored(self, W: Tensor) -> Factored:
        return Factored(self.scale * self.B, self.M @ self.A, None, self.dropout)


class MoSLoRA(LoRALike):
    """LoRA with a mixer.

    Args:
        rank: r, 1 to min(m, n).
        alpha, scaling, dropout: as LoRA.
        mixer: start of M: `kaiming` for U(-1/sqrt(r), 1/sqrt(r)), `orthogonal` for a random rotation, `identity` to start as LoRA.
    """

    formula = "r (m + n) + r^2"
    advice = "LoRA, plus a little freedom to mix its subspaces."

    def __init__(
        self, rank: int = 8, alpha: float = 8.0, scaling: Scaling = "rank", dropout: float = 0.0, mixer: Mixer = "kaiming"
    ) -> None:
        if mixer not in ("kaiming", "orthogonal", "identity"):
            raise UserError(f"adapter.method.mixer: {mixer!r} is not one of kaiming, orthogonal, identity")
        super().__init__(rank, alpha, scaling, dropout)
        self.mixer = mixer

    def adapter(self, site: Site, shared: nn.Module | None) -> MoSLoRAAdapter:
        return MoSLoRAAdapter(site, self)

    def count(self, site: Site) -> int:
        return super().count(site) + self.rank**2
