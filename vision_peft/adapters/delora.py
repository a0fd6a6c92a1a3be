"""DeLoRA: LoRA with pairs of unit length, so that one trained number bounds how far the weight can go.

    W' = W + D(A, B, lambda) - D(A_0, B_0, lambda_0)
    D = lambda / r  sum_k  (b_k / ||b_k||) (a_k / ||a_k||)  diag(norms of W's columns)

a_k: rows of A (r, n); b_k: columns of B (m, r); lambda: one number. Without the column norms ||D|| is at most lambda, however long A and B
grow: direction and strength are learned apart. B cannot start at zero, where its length has no direction, so the start is subtracted,
and W' = W: both factors ~ U(-1/sqrt(d), 1/sqrt(d)), d = n for A and r for B. The start is drawn anew from the seed on load, not stored.
Trained: r (m + n) + 1 numbers a weight; W is frozen. Lengths below 1e-4 count as 1e-4.

Source: Bini et al., "DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation", ICLR 2025; read in the code of huggingface/peft
(lambda_0 = 15; it starts at B = 0, where the bound on lengths gives the gradient) and of hhnqqq/MyTransformers, which subtracts the start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_rank
from vision_peft.engine.adapter import Evidence, Factored, FactoredAdapter, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_
from vision_peft.linalg.svd import basis_mark

SHORTEST = 1e-4


class DeLoRAAdapter(FactoredAdapter):
    norms: Tensor  # (n,), of W's columns
    A_start: Tensor  # (r, n)
    B_start: Tensor  # (m, r)

    def __init__(self, site: Site, rank: int, strength: float) -> None:
        super().__init__()
        out, columns = require_rank(site, rank)
        self.initial = strength
        self.A = nn.Parameter(torch.zeros(rank, columns))
        self.B = nn.Parameter(torch.zeros(out, rank))
        self.strength = nn.Parameter(torch.zeros(1))  # lambda
        self.register_buffer("norms", torch.zeros(columns), persistent=False)
        self.register_buffer("A_start", torch.zeros(rank, columns), persistent=False)
        self.register_buffer("B_start", torch.zeros(out, rank), persistent=False)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        kaiming_rows_(self.A, evidence.generator)
        kaiming_rows_(self.B, evidence.generator)
        self.strength.fill_(self.initial)
        self.norms.copy_(W.norm(dim=0))
        B, A = self._pair()
        self.B_start.copy_(B)
        self.A_start.copy_(A)

    def factored(self, W: Tensor) -> Factored:
        B, A = self._pair()
        return Factored(torch.cat([B, -self.B_start], 1), torch.cat([A, self.A_start]), trained=A.shape[0])

    def _pair(self) -> tuple[Tensor, Tensor]:
        """B (m, r) and A (r, n) with D = B A."""
        lengths = self.A.norm(dim=1).clamp(min=SHORTEST) * self.B.norm(dim=0).clamp(min=SHORTEST)
        return self.B * (self.strength / (lengths.numel() * lengths)), self.A * self.norms

    def fingerprint(self) -> Tensor:
        return basis_mark(self.B_start, self.A_start)


class DeLoRA(Method):
    """LoRA with decoupled angles and strength.

    Args:
        rank: r, 1 to min(m, n).
        strength: lambda at the start, above 0.
    """

    low_rank = True
    kind = "low-rank"
    formula = "r (m + n) + 1"
    advice = "training must be robust to a large learning rate: the strength of the update is bounded by a trained norm."

    def __init__(self, rank: int = 8, strength: float = 15.0) -> None:
        if rank < 1:
            raise UserError(f"adapter.method.rank: {rank} is not positive")
        if not strength > 0:
            raise UserError(f"adapter.method.strength: {strength} is not positive")
        self.rank, self.strength = rank, strength

    def adapter(self, site: Site, shared: nn.Module | None) -> DeLoRAAdapter:
        return DeLoRAAdapter(site, self.rank, self.strength)

    def count(self, site: Site) -> int:
        return self.rank * sum(site.matrix_shape) + 1
