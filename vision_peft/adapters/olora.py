"""OLoRA: LoRA that starts at an orthonormal basis, taken from the QR decomposition of the weight.

    W' = W + s (B A - B0 A0),    B0 = Q[:, :r],  A0 = R[:r],  W = Q R

Start: B = B0 with orthonormal columns, A = A0; hence W' = W. There is no 1 / s in the start: what is subtracted, s B0 A0, is s times
the projection of W on the span of its first r columns. A (r, n) and B (m, r) are trained, r (m + n) numbers a weight; W, A0 and B0
are frozen, and recomputed from W on load.

Only the first r columns of W decide Q[:, :r], so no more than they are decomposed, and R[:r] = Q[:, :r]^T W.

Source: Bueyuekakyuez, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775; read in the code of
huggingface/peft.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.adapters._lora_like import LoRALike
from vision_peft.adapters._started import StartedAdapter
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.site import Site


class OLoRAAdapter(StartedAdapter):
    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        exact = W.double()
        Q = torch.linalg.qr(exact[:, : self.A.shape[0]]).Q  # (m, r)
        self.start_at(Q, Q.mT @ exact)


class OLoRA(LoRALike):
    """Orthonormal low-rank adaptation.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale.
        scaling: `rank` for alpha / r, `sqrt_rank` for alpha / sqrt(r).
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
    """

    advice = "a LoRA start from the weights without an SVD."

    def adapter(self, site: Site, shared: nn.Module | None) -> OLoRAAdapter:
        return OLoRAAdapter(site, self.rank, self.scale, self.dropout)
