"""LoRA-MoE (MoLoRA): several small LoRAs a layer, and a router that mixes for each token the few that suit it best.

    y = W x + b + s sum over the k best j of g_j(x) B_j A_j x,    g(x) = softmax of the k largest entries of R x

E experts A_j (d, n), B_j (m, d) of d = ceil(r / E) ranks each, router R (E, n), s = alpha / r. Start: A_j and R within 1/sqrt(n), uniform,
B_j = 0, so y is the frozen layer's. Trained: E d (m + n) + E n numbers a weight. With k = E every expert acts, weighted by the router;
one expert is LoRA, without a router. A balance loss of weight `balance` keeps the router from sending every token to the same experts.

What a token is multiplied with depends on the token, so there is no weight to merge into, and only linear and attention layers have it.

Source: Zadouri et al., "Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction Tuning", ICLR 2024;
read in the code of hhnqqq/MyTransformers, which for k = E leaves the router out and takes the mean.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from vision_peft.adapters._experts import ExpertsAdapter, require_routing
from vision_peft.adapters._low_rank import require_dropout, require_rank, scale_of
from vision_peft.engine.adapter import Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.linalg.init import kaiming_rows_


class LoRAMoEAdapter(ExpertsAdapter):
    def __init__(self, site: Site, method: LoRAMoE) -> None:
        out, columns = require_rank(site, method.width)
        super().__init__(out, columns, method.experts, method.width, method.top_k, method.balance, method.dropout)
        self.scale = method.scale

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        super().initialize(W, evidence)
        kaiming_rows_(self.A, evidence.generator)
        self.B.zero_()


class LoRAMoE(Method):
    """Mixture of LoRA experts.

    Args:
        rank: r of all experts together.
        experts: E; each has the rank ceil(r / E).
        top_k: how many experts see a token, 2 to E.
        alpha: numerator of the scale alpha / r.
        balance: weight of the balance loss; 0 leaves it out.
        dropout: probability with which the experts' inputs are dropped while training.
    """

    reads_input = True
    merge = "impossible"
    kind = "mixture"
    formula = "E ceil(r / E) (m + n) + E n"
    advice = "inputs differ in kind and no merging is needed."
    tiny = {"experts": 3, "top_k": 3}  # no ties to break between float32 and bfloat16

    def __init__(
        self, rank: int = 8, experts: int = 4, top_k: int = 2, alpha: float = 8.0, balance: float = 1e-3, dropout: float = 0.0
    ) -> None:
        require_routing(experts, top_k, balance)
        self.rank, self.experts, self.top_k, self.alpha, self.balance = rank, experts, top_k, alpha, balance
        self.dropout = require_dropout(dropout)
        self.scale = scale_of(alpha, rank, "rank")
        self.width = math.ceil(rank / experts)

    def adapter(self, site: Site, shared: nn.Module | None) -> LoRAMoEAdapter:
        return LoRAMoEAdapter(site, self)

    def count(self, site: Site) -> int:
        out, columns = site.matrix_shape
        return self.experts * self.width * (out + columns) + (self.experts * columns if self.experts > 1 else 0)
