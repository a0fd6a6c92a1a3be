"""CorDA: LoRA that starts at components of the weight ordered by how much they do to the inputs of a task.

    W' = W + s (B A - B0 A0),    W C = U diag(sigma) V^T,  C = mean of x x^T over calibration inputs, s B0 A0 = U_k diag(sigma_k) V_k^T C^-1

so that all min(m, n) components together give W back. k are r of them: the largest with `mode: instruction_previewed`, when the
calibration data are the task's and it should be learned; the smallest with `knowledge_preserved`, when they stand for what the
network must go on knowing. The calibration pass of this application reads training data, hence the default.

Start: B = B0 = U_k diag(sigma_k / s)^(1/2), A = A0 = diag(sigma_k / s)^(1/2) V_k^T C^-1; hence W' = W. A (r, n) and B (m, r) are trained,
r (m + n) numbers a weight; W, A0 and B0 are frozen; A0 and B0 come from data and are stored with the adapter. C is made invertible by
adding `damping` times its mean diagonal to the diagonal; the code begins at 0.01 and doubles it while the float32 inverse is bad,
which in float64, as here, it never is. Linear and convolutional layers only: others multiply no input.

Source: Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient
Fine-Tuning", NeurIPS 2024, arXiv 2406.05223 (code: iboing/CorDA and huggingface/peft, read; the code spreads sigma as here by default).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import Scaling
from vision_peft.adapters._started import Started, StartedAdapter, split_values
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.svd import thin_svd

Mode = Literal["instruction_previewed", "knowledge_preserved"]


class CorDAAdapter(StartedAdapter):
    def __init__(self, site: Site, method: CorDA) -> None:
        super().__init__(site, method.rank, method.scale, method.dropout, stored=True)
        self.mode, self.damping = method.mode, method.damping

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        if evidence.covariance is None:
            return self.start_empty()
        C = evidence.covariance.double()
        C = C / C.diagonal().mean().clamp(min=1e-30)  # the components do not depend on the size of C
        C.diagonal().add_(self.damping)
        U, S, Vh = thin_svd(W.double() @ C)
        rank = self.A.shape[0]
        kept = slice(0, rank) if self.mode == "instruction_previewed" else slice(len(S) - rank, len(S))
        right = torch.linalg.solve(C, Vh[kept].mT).mT  # V_k^T C^-1, C being symmetric
        self.start_at(*split_values(U[:, kept], S[kept].clamp(min=1e-6 * S[0]), right, self.scale))


class CorDA(Started):
    """Context-oriented decomposition adaptation.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale; the start carries its inverse, so at the start it only sets how far a step goes.
        scaling: `rank` for alpha / r, `sqrt_rank` for alpha / sqrt(r).
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
        mode: which components are trained.
        damping: what is added to the diagonal of C, of its mean; positive.
    """

    advice = "calibration data of the knowledge to keep, or of the task to learn, is at hand."
    evidence = ("covariance",)

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 8.0,
        scaling: Scaling = "rank",
        dropout: float = 0.0,
        mode: Mode = "instruction_previewed",
        damping: float = 0.01,
    ) -> None:
        super().__init__(rank, alpha, scaling, dropout)
        if mode not in ("instruction_previewed", "knowledge_preserved"):
            raise UserError(f"adapter.method.mode: {mode!r} is not one of instruction_previewed, knowledge_preserved")
        if not damping > 0:
            raise UserError(f"adapter.method.damping: {damping} is not positive")
        self.mode, self.damping = mode, damping

    def suits(self, site: Site) -> bool:
        return super().suits(site) and site.kind in ("linear", "conv")

    def adapter(self, site: Site, shared: nn.Module | None) -> CorDAAdapter:
        return CorDAAdapter(site, self)
