"""HRA: the inputs are mirrored by a chain of Householder reflections, an orthogonal map that is also a low-rank update.

    W' = W H_1 H_2 ... H_r,    H_i = I - 2 u_i u_i^T,  u_i = v_i / ||v_i||

V (r, n) trained, r n numbers a weight; W is frozen. With u_i as columns of Y (n, r) the chain is I - Y T Y^T (compact WY form),
T^-1 = I / 2 + the strictly upper part of Y^T Y, so W' = W - (W Y T) Y^T: two thin factors, no product of n x n matrices.
Start: pairs of equal vectors, v ~ U(-1/sqrt(n), 1/sqrt(n)) for each pair; the two reflections cancel, so W' = W, and r is even. The two
vectors of a pair have opposite gradients and part at the first step.
Penalty: lambda ||I - Y^T Y||^2, which trades the freedom of the chain for orthogonal mirrors; 0 by default.

The limit of a large lambda (`orthogonal`): mirrors made orthonormal by Gram-Schmidt, H = I - 2 Y Y^T. Equal pairs cannot be orthonormal and
such an H is never the identity, so here the start's own H_0 is undone first, W' = W H_0 H with H_0 frozen and saved: this project's choice.

Source: Yuan, Liu and Xu, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation", NeurIPS 2024;
checked against the layer of huggingface/peft.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.engine.adapter import Evidence, Factored, FactoredAdapter, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_


class HRAAdapter(FactoredAdapter):
    Y_0: Tensor | None  # (r, n), rows orthonormal: the mirrors at the start

    def __init__(self, site: Site, method: HRA) -> None:
        super().__init__()
        self.penalty_weight, self.orthogonal = method.penalty_weight, method.orthogonal
        columns = site.matrix_shape[1]
        if method.rank > columns:
            raise UserError(f"adapter.method.rank: {method.rank} does not fit {site.name}, which has {columns} inputs")
        self.V = nn.Parameter(torch.ones(method.rank, columns))
        self.register_buffer("Y_0", torch.zeros(method.rank, columns) if self.orthogonal else None)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        if self.orthogonal:
            kaiming_rows_(self.V, evidence.generator)
            self.Y_0.copy_(self.mirrors())
        else:
            pairs = kaiming_rows_(torch.empty(len(self.V) // 2, self.V.shape[1]), evidence.generator)
            self.V.copy_(pairs.repeat_interleave(2, dim=0))

    def mirrors(self) -> Tensor:
        """Y^T (r, n), rows of unit length."""
        return torch.linalg.qr(self.V.mT).Q.mT if self.orthogonal else F.normalize(self.V, dim=1)

    def factored(self, W: Tensor) -> Factored:
        A = self.mirrors()
        if self.orthogonal:
            back = W @ self.Y_0.mT  # (m, r)
            B = -2 * (W @ A.mT - 2 * back @ (self.Y_0 @ A.mT))  # W H_0 first: its part of the update is constant
            return Factored(torch.cat([B, -2 * back], dim=1), torch.cat([A, self.Y_0]), trained=len(A))
        T_inverse = (A @ A.mT).triu(1) + torch.eye(len(A), dtype=A.dtype, device=A.device) / 2
        return Factored(-torch.linalg.solve_triangular(T_inverse, W @ A.mT, upper=True, left=False), A)

    def penalty(self) -> Tensor | float:
        if not self.penalty_weight:
            return 0.0
        A = self.mirrors()
        return self.penalty_weight * (A @ A.mT - torch.eye(len(A), dtype=A.dtype, device=A.device)).square().sum()


class HRA(Method):
    """Householder reflection adaptation.

    Args:
        rank: r, reflections in the chain, at most n; even unless `orthogonal`.
        penalty_weight: lambda.
        orthogonal: mirrors orthonormal at all times.
    """

    low_rank = True
    kind = "rotation"
    formula = "r n"
    advice = "an orthogonal update is wanted at the cost of LoRA, and exported as one."

    def __init__(self, rank: int = 8, penalty_weight: float = 0.0, orthogonal: bool = False) -> None:
        if rank < 1:
            raise UserError(f"adapter.method.rank: {rank} is not positive")
        if rank % 2 and not orthogonal:
            raise UserError(f"adapter.method.rank: {rank} is odd, but reflections start in pairs that cancel")
        if penalty_weight < 0:
            raise UserError(f"adapter.method.penalty_weight: {penalty_weight} is negative")
        if penalty_weight and orthogonal:
            raise UserError("adapter.method.penalty_weight: orthogonal mirrors have no penalty")
        self.rank, self.penalty_weight, self.orthogonal = rank, penalty_weight, orthogonal

    def suits(self, site: Site) -> bool:
        return super().suits(site) and site.matrix_shape[1] > 1  # a single input has one mirror only, that nothing can turn

    def adapter(self, site: Site, shared: nn.Module | None) -> HRAAdapter:
        return HRAAdapter(site, self)

    def count(self, site: Site) -> int:
        return self.rank * site.matrix_shape[1]
