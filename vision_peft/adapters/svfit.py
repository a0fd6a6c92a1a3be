"""SVFit: the singular vectors of the pretrained weight stay, its leading singular values are trained.

    W' = W + U_r diag(d) V_r^T,    W = U diag(s) V^T,  d = sigma - s_r

U_r (m, r), V_r (n, r) frozen, recomputed from W on load; d (r,) trained, zero at the start, so W' = W and no residual is stored.
r numbers a weight; r = min(m, n) by default, which gives the counts of the paper (768 for a 768 x 768 weight). q and v are
decomposed each for itself where the projection is fused.

Source: "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", arXiv 2409.05926;
reconstructed from the abstract: default rank and the offset form are this project's choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_rank
from vision_peft.engine.adapter import Adapter, Evidence, Factored, Method
from vision_peft.engine.site import Site
from vision_peft.linalg.svd import basis_mark
from vision_peft.linalg.svd_cache import cached_svd


class SVFitAdapter(Adapter):
    U: Tensor  # (m, r)
    Vh: Tensor  # (r, n)

    def __init__(self, site: Site, rank: int | None) -> None:
        super().__init__()
        self.rank = min(site.matrix_shape) if rank is None else rank
        require_rank(site, self.rank)
        self.d = nn.Parameter(torch.zeros(self.rank))
        self.register_buffer("U", None, persistent=False)
        self.register_buffer("Vh", None, persistent=False)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        U, _, Vh = cached_svd(W)
        self.U, self.Vh = U[:, : self.rank].contiguous(), Vh[: self.rank].contiguous()
        self.d.zero_()

    def weight(self, W: Tensor) -> Tensor:
        return torch.addmm(W, self.U * self.d, self.Vh)

    def factored(self, W: Tensor) -> Factored | None:
        # two thin products a token beat one more dense matrix only while r is small
        return Factored(self.U * self.d, self.Vh) if 4 * self.rank <= min(W.shape) else None

    def fingerprint(self) -> Tensor:
        return basis_mark(self.U, self.Vh)


class SVFit(Method):
    """Training of singular values.

    Args:
        rank: how many of the leading singular values are trained; null for all.
    """

    kind = "svd"
    low_rank = False  # of rank r, but with a basis that belongs to this one weight: exported as a LoRA only by truncation
    source = "abstract"
    formula = "r, min(m, n) by default"
    advice = "a few hundred numbers a layer, in the weight's own directions."

    def __init__(self, rank: int | None = None) -> None:
        self.rank = rank

    def adapter(self, site: Site, shared: nn.Module | None) -> SVFitAdapter:
        return SVFitAdapter(site, self.rank)

    def count(self, site: Site) -> int:
        return min(site.matrix_shape) if self.rank is None else self.rank
