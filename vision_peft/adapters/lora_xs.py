"""LoRA-XS: between the leading singular vectors of the pretrained weight sits a small trained matrix.

    y = W x + b + s B R A drop(x),     B = U_r,  A = S_r V_r^T,   W = U S V^T,   s = alpha / r

B (m, r) and A (r, n) are frozen, B A is the best rank-r approximation of W; they are recomputed from W on load, with the sign of every
pair fixed by the largest entry of its left vector, because the entries of R off its diagonal change with signs. R (r, r) is trained and
starts at N(0, 1e-5^2): W' is nearly W, not exactly. r^2 numbers a weight, whatever m and n are. W itself is not modified.

Source: Balazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv 2405.17604 (code:
MohammadrezaBanaei/LoRA-XS). Defaults of rank and alpha are this project's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.adapters._core import CoreAdapter
from vision_peft.adapters._low_rank import require_dropout, scale_of
from vision_peft.engine.adapter import Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.svd import basis_mark
from vision_peft.linalg.svd_cache import cached_svd


class LoRAXSAdapter(CoreAdapter):
    def __init__(self, site: Site, method: LoRAXS) -> None:
        super().__init__(site, method.rank, method.scale, method.dropout, saved=False)
        self.init_std = method.init_std

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        rank = len(self.R)
        U, S, Vh = cached_svd(W)
        U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
        signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # (1, r)
        self.B.copy_(U * signs)
        self.A.copy_(S[:, None] * Vh * signs.mT)
        self.R.copy_(torch.randn(self.R.shape, generator=evidence.generator) * self.init_std)

    def fingerprint(self) -> Tensor:
        # the second mark changes with the sign of a pair, as what R means does
        return torch.cat([basis_mark(self.B, self.A), basis_mark(self.B, self.B.new_ones(len(self.R), 1))])


class LoRAXS(Method):
    """A trained r x r matrix in the singular basis of the weight.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale alpha / r; null for r.
        init_std: standard deviation of R's start.
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
    """

    low_rank = True
    kind = "svd"
    identity_at_init = False  # R starts near zero only
    formula = "r^2"
    advice = "a few hundred numbers a layer without any calibration data."

    def __init__(self, rank: int = 32, alpha: float | None = None, init_std: float = 1e-5, dropout: float = 0.0) -> None:
        if init_std < 0:
            raise UserError(f"adapter.method.init_std: {init_std} is negative")
        self.rank, self.alpha, self.init_std, self.dropout = rank, alpha, init_std, require_dropout(dropout)
        self.scale = scale_of(rank if alpha is None else alpha, rank, "rank")

    def adapter(self, site: Site, shared: nn.Module | None) -> LoRAXSAdapter:
        return LoRAXSAdapter(site, self)

    def count(self, site: Site) -> int:
        return self.rank**2
