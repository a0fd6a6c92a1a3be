"""LoHa: the update is the entrywise (Hadamard) product of two low-rank matrices, and so has rank up to r^2.

    W' = W + s (B1 A1) * (B2 A2)        B1, B2 (m, r), A1, A2 (r, n), s = alpha / r, * entry by entry

Start: B1, B2 ~ U(-1/sqrt(r), 1/sqrt(r)), A1 ~ U(-1/sqrt(n), 1/sqrt(n)), A2 = 0, so W' = W. Exactly one of the four is zero: with two
zeros in one product of every entry no factor would ever get a gradient. Trained: 2 r (m + n) numbers a weight; W is frozen.

Row i of the update is ((row i of B1) x (row i of B2)) times the columns (column of A1) x (column of A2), x Kronecker's product of two
vectors. These are factors (m, r^2) and (r^2, n), which the engine takes while r^2 is small beside the weight.

Source: Hyeon-Woo, Ye-Bin and Oh, "FedPara: Low-rank Hadamard Product for Communication-efficient Federated Learning", ICLR 2022;
Yeh et al., LyCORIS, ICLR 2024; read in the code of huggingface/peft, whose start this is (kernels flattened, not Tucker).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_rank, scale_of
from vision_peft.engine.adapter import Adapter, Evidence, Factored, Method
from vision_peft.engine.site import Site
from vision_peft.linalg.init import kaiming_rows_


class LoHaAdapter(Adapter):
    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__()
        out, columns = require_rank(site, rank)
        self.scale = scale
        self.B1, self.B2 = (nn.Parameter(torch.zeros(out, rank)) for _ in range(2))
        self.A1, self.A2 = (nn.Parameter(torch.zeros(rank, columns)) for _ in range(2))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        for factor in (self.B1, self.A1, self.B2):
            kaiming_rows_(factor, evidence.generator)
        self.A2.zero_()

    def weight(self, W: Tensor) -> Tensor:
        return torch.addcmul(W, self.B1 @ self.A1, self.B2 @ self.A2, value=self.scale)

    def factored(self, W: Tensor) -> Factored | None:
        rank = self.B1.shape[1]
        if 4 * rank**2 > min(W.shape):  # then one dense gradient is cheaper than the thin products
            return None
        B = (self.B1[:, :, None] * self.B2[:, None, :]).flatten(1)  # (m, r^2)
        A = (self.A1[:, None, :] * self.A2[None, :, :]).flatten(0, 1)  # (r^2, n)
        return Factored(self.scale * B, A)


class LoHa(Method):
    """Low-rank Hadamard product.

    Args:
        rank: r of each of the two products, 1 to min(m, n).
        alpha: numerator of the scale alpha / r.
    """

    kind = "low-rank"
    low_rank = False  # of rank r^2, and in factored form only where that is small
    formula = "2 r (m + n)"
    advice = "rank r squared at the price of two LoRAs of rank r."

    def __init__(self, rank: int = 8, alpha: float = 8.0) -> None:
        self.rank, self.alpha = rank, alpha
        self.scale = scale_of(alpha, rank, "rank")

    def adapter(self, site: Site, shared: nn.Module | None) -> LoHaAdapter:
        return LoHaAdapter(site, self.rank, self.scale)

    def count(self, site: Site) -> int:
        return 2 * self.rank * sum(site.matrix_shape)
