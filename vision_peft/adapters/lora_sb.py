"""LoRA-SB: LoRA-XS whose frozen factors and whose start come from the first step that full fine-tuning would take.

    y = W x + b + B R A drop(x)
    start: G = -eta sign(g),  G = U S V^T,  B = U_r,  A = V_r^T,  R = diag(S_r)

g (m, n) is the gradient of the loss in W over calibration batches, of which only the signs matter; G is AdamW's first step at the rate
eta. B (m, r) and A (r, n) are frozen and orthonormal, R (r, r) is trained: r^2 numbers a weight. At the start W' - W is the best rank-r
approximation of G, so the adapted network is not the frozen one; nothing is subtracted from W. Because of B^T B = A A^T = I, a gradient
step on R moves W by B B^T g A^T A, the best that this subspace allows, and no scale is needed. A and B are saved: nothing recomputes
them. Where no gradient arrives (g = 0) they are the leading singular vectors of W, and R = 0.

Source: Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
arXiv 2411.19557 (code: RaghavSinghal10/lora-sb). The code decomposes in bfloat16 by a randomised SVD, which spoils orthonormality;
here the SVD is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.adapters._core import CoreAdapter
from vision_peft.adapters._low_rank import require_dropout
from vision_peft.engine.adapter import Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.svd import thin_svd
from vision_peft.linalg.svd_cache import cached_svd


class LoRASBAdapter(CoreAdapter):
    def __init__(self, site: Site, method: LoRASB) -> None:
        super().__init__(site, method.rank, 1.0, method.dropout, saved=True)
        self.eta = method.eta

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        if evidence.gradient is None:
            return  # everything is about to be loaded
        rank, idle = len(self.R), not evidence.gradient.any()
        U, S, Vh = cached_svd(W) if idle else thin_svd(-self.eta * evidence.gradient.to(W).sign())
        self.B.copy_(U[:, :rank])
        self.A.copy_(Vh[:rank])
        self.R.copy_(torch.zeros_like(self.R) if idle else torch.diag(S[:rank]))


class LoRASB(Method):
    """A trained r x r matrix in the singular basis of the first full fine-tuning step.

    Args:
        rank: r, 1 to min(m, n).
        eta: length of that step in every entry: the first learning rate of the schedule.
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
    """

    evidence = ("gradient",)
    low_rank = True
    kind = "low-rank"
    identity_at_init = False
    formula = "r^2"
    advice = "a few hundred numbers a layer, started where the first full step would go."

    def __init__(self, rank: int = 32, eta: float = 1e-4, dropout: float = 0.0) -> None:
        if rank < 1:
            raise UserError(f"adapter.method.rank: {rank} is not positive")
        if eta <= 0:
            raise UserError(f"adapter.method.eta: {eta} is not positive")
        self.rank, self.eta, self.dropout = rank, eta, require_dropout(dropout)

    def adapter(self, site: Site, shared: nn.Module | None) -> LoRASBAdapter:
        return LoRASBAdapter(site, self)

    def count(self, site: Site) -> int:
        return self.rank**2
