"""LoKr: the update is a Kronecker product of a small matrix and a low-rank one.

    W' = W + s w1 (x) w2        w1 (m1, n1), w2 (m2, n2), m = m1 m2, n = n1 n2, s = alpha / r

w2 = B2 A2 with B2 (m2, r), A2 (r, n2) where r < max(m2, n2) / 2, else dense; w1 is dense, or with `decompose_both` B1 A1 where
r < max(m1, n1) / 2. m1 is the divisor of m nearest to sqrt(m) from below, or what `factor` asks for; n1 likewise. Kernels: the input
channels are split and w2 carries the window. Start: w1 (or B1) = 0, every other factor uniform within 1/sqrt(its columns), so W' = W.
Trained: the entries of the factors, m1 n1 + r (m2 + n2) numbers a weight in the usual case; W is frozen.

`factor: 1` makes w1 one number: LoRA with a trained scale.

Source: Edalati et al., "KronA: Parameter Efficient Tuning with Kronecker Adapter", 2022; Yeh et al., LyCORIS, ICLR 2024; read in the
code of huggingface/peft, whose scale (LyCORIS: 1 where both factors are dense) and start this is; w1 is never longer than w2 here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.adapters._kronecker_shapes import Shape, kronecker_shapes
from vision_peft.adapters._low_rank import scale_of
from vision_peft.engine.adapter import Adapter, Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_


class KroneckerFactor(nn.Module):
    """A matrix (rows, columns): dense, or left @ right of rank r."""

    def __init__(self, shape: Shape, rank: int | None) -> None:
        super().__init__()
        rows, columns = shape
        self.left = None if rank is None else nn.Parameter(torch.zeros(rows, rank))
        self.right = nn.Parameter(torch.zeros(rows if rank is None else rank, columns))

    def initialize(self, zero: bool, generator: torch.Generator) -> None:
        kaiming_rows_(self.right, generator)
        if self.left is not None:
            kaiming_rows_(self.left, generator)
        if zero:
            (self.right if self.left is None else self.left).zero_()

    def forward(self) -> Tensor:
        return self.right if self.left is None else self.left @ self.right


class LoKrAdapter(Adapter):
    def __init__(self, site: Site, method: LoKr) -> None:
        super().__init__()
        self.scale = method.scale
        self.w1, self.w2 = (KroneckerFactor(shape, rank) for shape, rank in method.factors(site))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.w1.initialize(True, evidence.generator)
        self.w2.initialize(False, evidence.generator)

    def weight(self, W: Tensor) -> Tensor:
        return W + torch.kron(self.scale * self.w1(), self.w2())


class LoKr(Method):
    """Low-rank Kronecker product.

    Args:
        rank: r of the factors that are low-rank products.
        alpha: numerator of the scale alpha / r.
        factor: the size that m1 and n1 should have; null for the divisor nearest to the square root.
        decompose_both: make w1 a low-rank product too, where r is small beside it.
    """

    kind = "kronecker"
    formula = "m1 n1 + r (m2 + n2)"
    advice = "very small files, and layers whose widths factorise well."

    def __init__(self, rank: int = 8, alpha: float = 8.0, factor: int | None = None, decompose_both: bool = False) -> None:
        if factor is not None and factor < 1:
            raise UserError(f"adapter.method.factor: {factor} is not positive")
        self.rank, self.alpha, self.factor, self.decompose_both = rank, alpha, factor, decompose_both
        self.scale = scale_of(alpha, rank, "rank")

    def factors(self, site: Site) -> list[tuple[Shape, int | None]]:
        """Shape and rank of w1 and w2; None for a dense one."""
        first, second = kronecker_shapes(site, self.factor)
        low = [self.decompose_both and 2 * self.rank < max(first), 2 * self.rank < max(second)]
        return [(shape, self.rank if is_low else None) for shape, is_low in zip((first, second), low)]

    def adapter(self, site: Site, shared: nn.Module | None) -> LoKrAdapter:
        return LoKrAdapter(site, self)

    def count(self, site: Site) -> int:
        return sum(rows * columns if rank is None else rank * (rows + columns) for (rows, columns), rank in self.factors(site))
