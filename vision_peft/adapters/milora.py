"""MiLoRA: LoRA that starts at the minor singular triples of the weight, so that what the weight mostly does is left alone at first.

    W' = W + s (B A - B0 A0),    s B0 A0 = U_- diag(sigma_-) V_-^T,  the r smallest of min(m, n) singular triples of W

Start: B = B0 = U_- diag(sigma_- / s)^(1/2), A = A0 = diag(sigma_- / s)^(1/2) V_-^T; hence W' = W. A (r, n) and B (m, r) are trained,
r (m + n) numbers a weight; W, A0 and B0 are frozen, and recomputed from W on load. Values below a millionth of the largest are taken
as that, since a pair of zeros would have no gradient.

Source: Wang et al., "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning", NAACL 2025,
arXiv 2406.09044; read in the code of hhnqqq/MyTransformers, whose randomised variant takes the largest triples by mistake:
the full SVD is followed.
"""

from __future__ import annotations

from torch import Tensor, nn

from vision_peft.adapters._started import Started, StartedAdapter, split_values
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.site import Site
from vision_peft.linalg.svd_cache import cached_svd


class MiLoRAAdapter(StartedAdapter):
    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        U, S, Vh = cached_svd(W)
        rank = self.A.shape[0]
        floor = 1e-6 * S[0]  # of the whole weight: among the smallest alone there may be zeros only
        self.start_at(*split_values(U[:, -rank:], S[-rank:].clamp(min=floor), Vh[-rank:], self.scale))


class MiLoRA(Started):
    """Minor singular component adaptation.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale; the start carries its inverse, so at the start it only sets how far a step goes.
        scaling: `rank` for alpha / r, `sqrt_rank` for alpha / sqrt(r).
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
    """

    advice = "what the weights hold most strongly must stay: the smallest directions are trained."

    def adapter(self, site: Site, shared: nn.Module | None) -> MiLoRAAdapter:
        return MiLoRAAdapter(site, self.rank, self.scale, self.dropout)
