"""LoRA-FA: LoRA with its down-projection frozen at the random start.

    W' = W + s B A,    A (r, n) ~ U(-1/sqrt(n), 1/sqrt(n)) frozen, B (m, r) trained

The update lives in the random row space of A. Start: B = 0, so W' = W. Trained: r m numbers a weight. A is drawn anew from the seed
on load, not stored. A layer would only have to keep A x for its backward pass; here the engine keeps x, as it does for LoRA.

`projected` replaces the gradient of B before every step by

    g_B' = g_B (A A^T + 1e-8 I)^-1 / s^2

so that the change s g_B' A of the weight is the projection G A^T (A A^T)^-1 A of the dense gradient G onto the row space of A.

Source: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv 2308.03303; read in
the code of huggingface/peft, whose optimizer has the projected gradient always on (and in bfloat16 where it can; here float64).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vision_peft.adapters._lora_like import require_alpha
from vision_peft.adapters._low_rank import Scaling, require_dropout, require_rank, scale_of
from vision_peft.engine.adapter import Adapter, Clock, Evidence, Factored, FactoredAdapter, Method, Shared
from vision_peft.engine.site import Site
from vision_peft.linalg.init import kaiming_rows_
from vision_peft.linalg.svd import basis_mark


class LoRAFAAdapter(FactoredAdapter):
    A: Tensor  # (r, n)

    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        out, columns = require_rank(site, rank)
        self.scale, self.dropout = scale, dropout
        self.B = nn.Parameter(torch.zeros(out, rank))
        self.register_buffer("A", torch.zeros(rank, columns), persistent=False)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        kaiming_rows_(self.A, evidence.generator)
        self.B.zero_()

    def factored(self, W: Tensor) -> Factored:
        return Factored(self.scale * self.B, self.A, None, self.dropout)

    def fingerprint(self) -> Tensor:
        return basis_mark(self.A.mT, self.A)

    def project_gradient(self) -> None:
        A, g = self.A.double(), self.B.grad.double()
        gram = A @ A.mT + 1e-8 * torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
        self.B.grad.copy_(torch.linalg.solve(gram, g.mT).mT / self.scale**2)


class LoRAFA(Method):
    """LoRA with a frozen A.

    Args:
        rank: r, 1 to min(m, n).
        alpha, scaling, dropout: as LoRA.
        projected: train B along the projection of the dense gradient.
    """

    low_rank = True
    kind = "low-rank"
    formula = "r m"
    advice = "half of LoRA's trained state should do."

    def __init__(
        self, rank: int = 8, alpha: float = 8.0, scaling: Scaling = "rank", dropout: float = 0.0, projected: bool = False
    ) -> None:
        self.rank, self.alpha, self.scaling, self.dropout = rank, require_alpha(alpha), scaling, require_dropout(dropout)
        self.projected = projected
        self.scale = scale_of(alpha, rank, scaling)

    def adapter(self, site: Site, shared: nn.Module | None) -> LoRAFAAdapter:
        return LoRAFAAdapter(site, self.rank, self.scale, self.dropout)

    def adjust_gradients(self, adapters: Mapping[str, Adapter], shared: Shared | None, clock: Clock) -> None:
        for adapter in adapters.values():
            if self.projected and adapter.B.grad is not None:
                adapter.project_gradient()

    def count(self, site: Site) -> int:
        return self.rank * site.matrix_shape[0]
