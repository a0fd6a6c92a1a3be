"""GOAT: a mixture of LoRA experts that start in different segments of the pretrained weight's spectrum.

    y = W x + b + s sum over the k best j of g_j(x) B_j A_j x - (s / E) sum over all j of B_j^0 A_j^0 x

E experts of d = r / E ranks, W = U diag(sigma) V^T cut into E segments of t = floor(min(m, n) / E) triplets; expert j starts with the first
d of segment j (the triplets from (j - 1) t on),

    B_j^0 = U diag(sigma)^(1/2) / sqrt(s rho),    A_j^0 = diag(sigma)^(1/2) V^T / sqrt(s rho),    s = sqrt(3 eta n / r) or alpha / r

so s B_j^0 A_j^0 is a part of W divided by rho. The authors subtract the mean of the experts from W; here W stays and the subtraction is
a frozen branch, recomputed from W on load. Gates and balance loss as in LoRA-MoE: g = softmax of the k largest entries of R x, R (E, n)
uniform within 1/sqrt(n). The start is the frozen layer only on average over the experts: a token gets its k experts less the mean.
Trained: r (m + n) + E n numbers a weight. Nothing to merge into: what a token is multiplied with depends on the token.

Source: Fan et al., "Make LoRA Great Again: Boosting LoRA with Adaptive Singular Values and Mixture-of-Experts Optimization Alignment",
ICML 2025; read in the text and in the code of hhnqqq/MyTransformers; E = 8 is the default of the authors' Facico/GOAT-PEFT. That the
balance loss trains the router alone is this project's choice.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.adapters._experts import ExpertsAdapter, require_routing
from vision_peft.adapters._low_rank import require_dropout, scale_of
from vision_peft.engine.adapter import Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.svd import basis_mark
from vision_peft.linalg.svd_cache import cached_svd


class GOATAdapter(ExpertsAdapter):
    A0: Tensor  # (r, n)
    B0: Tensor  # (m, r)

    def __init__(self, site: Site, method: GOAT) -> None:
        out, columns = site.matrix_shape
        width, smallest = method.rank // method.experts, min(out, columns)
        if width > smallest // method.experts:
            raise UserError(
                f"adapter.method.rank: {method.rank} does not fit {site.name}, a {out} x {columns} matrix "
                f"({method.experts} experts of at most {smallest // method.experts} ranks)"
            )
        super().__init__(out, columns, method.experts, width, method.top_k, method.balance, method.dropout)
        self.scale = method.scale(columns)
        self.rho = method.rho
        self.register_buffer("A0", torch.zeros_like(self.A.data), persistent=False)
        self.register_buffer("B0", torch.zeros_like(self.B.data), persistent=False)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        super().initialize(W, evidence)
        U, S, Vh = cached_svd(W)
        segment = len(S) // self.experts
        picked = (segment * torch.arange(self.experts, device=S.device)[:, None] + torch.arange(self.width, device=S.device)).flatten()
        root = (S[picked] / (self.scale * self.rho)).sqrt()
        self.A0.copy_(root[:, None] * Vh[picked])
        self.B0.copy_(U[:, picked] * root)
        self.A.copy_(self.A0)
        self.B.copy_(self.B0)

    def branch(self, x: Tensor) -> Tensor:
        start = F.linear(F.linear(x, self.A0.to(x.dtype)), (self.scale / self.experts * self.B0).to(x.dtype))
        return super().branch(x) - start

    def fingerprint(self) -> Tensor:
        return basis_mark(self.B0, self.A0)


class GOAT(Method):
    """Great LoRA mixture of experts.

    Args:
        rank: r of all experts together, a multiple of `experts`.
        experts: E segments of the spectrum.
        top_k: how many experts see a token, 2 to E.
        rho: how much smaller than its part of W an expert starts.
        eta: s = sqrt(3 eta n / r), eta the ratio of full fine-tuning's learning rate to this one.
        alpha: s = alpha / r instead, where it is given.
        balance: weight of the balance loss; 0 leaves it out.
        dropout: probability with which the experts' inputs are dropped while training.
    """

    reads_input = True
    merge = "impossible"
    identity_at_init = False
    kind = "mixture"
    formula = "r (m + n) + E n"
    advice = "several experts should start from different parts of the spectrum, and no merging is needed."
    tiny = {"rank": 4, "experts": 2, "top_k": 2}  # no ties to break between float32 and bfloat16

    def __init__(
        self,
        rank: int = 8,
        experts: int = 8,
        top_k: int = 2,
        rho: float = 10.0,
        eta: float = 1.0,
        alpha: float | None = None,
        balance: float = 1e-3,
        dropout: float = 0.0,
    ) -> None:
        require_routing(experts, top_k, balance)
        if rank < 1 or rank % experts:
            raise UserError(f"adapter.method.rank: {rank} is not a multiple of the {experts} experts")
        for key, value in (("rho", rho), ("eta", eta), ("alpha", alpha)):
            if value is not None and not value > 0:
                raise UserError(f"adapter.method.{key}: {value} is not positive")
        self.rank, self.experts, self.top_k, self.rho, self.eta, self.alpha = rank, experts, top_k, rho, eta, alpha
        self.balance, self.dropout = balance, require_dropout(dropout)

    def scale(self, columns: int) -> float:
        return math.sqrt(3 * self.eta * columns / self.rank) if self.alpha is None else scale_of(self.alpha, self.rank, "rank")

    def adapter(self, site: Site, shared: nn.Module | None) -> GOATAdapter:
        return GOATAdapter(site, self)

    def count(self, site: Site) -> int:
        out, columns = site.matrix_shape
        return self.rank * (out + columns) + (self.experts * columns if self.experts > 1 else 0)
