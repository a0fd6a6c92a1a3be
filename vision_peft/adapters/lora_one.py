"""LoRA-One: LoRA that starts at one spectral step of gradient descent.

    W' = W + s B A,    -G = U diag(sigma) V^T,  G the mean gradient of the loss in W over calibration batches

Start: B = U_r diag(sigma_r / sigma_1)^(1/2) / sqrt(gamma), A = diag(sigma_r / sigma_1)^(1/2) V_r^T / sqrt(gamma), so that

    s B A = -s / (gamma sigma_1) G_r        G_r the best approximation of G of rank r

The start is a step in the direction of descent, of spectral norm s / gamma whatever the size of the gradient: the network is not the
frozen one before training. `offset: true` subtracts the start, W' = W + s (B A - B0 A0), which keeps its directions and gives up
its step. A (r, n) and B (m, r) are trained, r (m + n) numbers a weight; W is frozen; A0 and B0 are stored with the adapter. Where
the gradient is zero the start is LoRA's.

Source: Zhang, Liu and Chen, "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models, Provably and
Efficiently", ICML 2025, arXiv 2502.01235 (code: YuanheZ/LoRA-One, read; it subtracts nothing). The SVD is exact, in place of a
randomised one; alpha and scaling are those of its commands.
"""

from __future__ import annotations

from torch import Tensor, nn

from vision_peft.adapters._lora_like import LoRALike
from vision_peft.adapters._low_rank import Scaling
from vision_peft.adapters._started import StartedAdapter, lora_start
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.svd import thin_svd


class LoRAOneAdapter(StartedAdapter):
    def __init__(self, site: Site, method: LoRAOne) -> None:
        super().__init__(site, method.rank, method.scale, method.dropout, offset=method.offset, stored=True)
        self.gamma = method.gamma

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        if evidence.gradient is None:
            return self.start_empty()
        if not evidence.gradient.any():
            return self.start_at(*lora_start(self, evidence.generator))
        rank = self.A.shape[0]
        U, S, Vh = thin_svd(-evidence.gradient.to(W))
        root = (S[:rank] / (S[0] * self.gamma)).sqrt()
        self.start_at(U[:, :rank] * root, root[:, None] * Vh[:rank])


class LoRAOne(LoRALike):
    """One full gradient step as a start.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale.
        scaling: `rank` for alpha / r, `sqrt_rank` for alpha / sqrt(r).
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
        gamma: positive; larger is a smaller start.
        offset: subtract the start, so that training begins at the pretrained network.
    """

    advice = "few steps are affordable and a calibration gradient is at hand."
    evidence = ("gradient",)
    identity_at_init = False

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        scaling: Scaling = "sqrt_rank",
        dropout: float = 0.0,
        gamma: float = 128.0,
        offset: bool = False,
    ) -> None:
        super().__init__(rank, alpha, scaling, dropout)
        if not gamma > 0:
            raise UserError(f"adapter.method.gamma: {gamma} is not positive")
        self.gamma, self.offset = gamma, offset
        self.identity_at_init = offset

    def adapter(self, site: Site, shared: nn.Module | None) -> LoRAOneAdapter:
        return LoRAOneAdapter(site, self)
