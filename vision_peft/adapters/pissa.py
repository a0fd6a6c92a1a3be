"""PiSSA: LoRA that starts at the principal singular triples of the weight, so that training moves what matters most in it.

    W' = W + s (B A - B0 A0),    s B0 A0 = U_r diag(sigma_r) V_r^T,  the best approximation of W of rank r

Start: B = B0 = U_r diag(sigma_r / s)^(1/2), A = A0 = diag(sigma_r / s)^(1/2) V_r^T, with W = U diag(sigma) V^T; hence W' = W.
A (r, n) and B (m, r) are trained, r (m + n) numbers a weight; W, A0 and B0 are frozen. The paper trains B A on top of the residual
W - s B0 A0: the same map. A0 and B0 are recomputed from W on load. Slices of a fused projection are decomposed each for itself.
The SVD is exact and cached; the paper's randomised one for large models is left out.

Source: Meng, Wang and Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
NeurIPS 2024, arXiv 2404.02948; read in the code of huggingface/peft.
"""

from __future__ import annotations

from torch import Tensor, nn

from vision_peft.adapters._started import Started, StartedAdapter, split_values
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.site import Site
from vision_peft.linalg.svd_cache import cached_svd


class PiSSAAdapter(StartedAdapter):
    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        U, S, Vh = cached_svd(W)
        rank = self.A.shape[0]
        self.start_at(*split_values(U[:, :rank], S[:rank], Vh[:rank], self.scale))


class PiSSA(Started):
    """Principal singular values and vectors adaptation.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale; the start carries its inverse, so at the start it only sets how far a step goes.
        scaling: `rank` for alpha / r, `sqrt_rank` for alpha / sqrt(r).
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
    """

    advice = "LoRA converges too slowly: the principal directions are trained; take a smaller learning rate."

    def adapter(self, site: Site, shared: nn.Module | None) -> PiSSAAdapter:
        return PiSSAAdapter(site, self.rank, self.scale, self.dropout)
