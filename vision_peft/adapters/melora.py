"""MELoRA: N small LoRAs side by side, each from one part of the inputs to one part of the outputs.

    W' = W + s diag(B_1, ..., B_N) diag(A_1, ..., A_N),    A_i (r/N, n/N), B_i (m/N, r/N), s = alpha / r

The change is block diagonal. Its rank can be r, for the numbers of a LoRA of rank r/N: r (m + n) / N a weight, trained; W is frozen.
Start: A_i ~ U(-1/sqrt(n/N), 1/sqrt(n/N)), B_i = 0, so W' = W. Where `minis` does not divide both sides of a weight, N is the largest
divisor of `minis` that does, down to 1, which is LoRA; the rank r is kept.

Source: Ren et al., "MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning", ACL 2024; read in the code of
hhnqqq/MyTransformers, which refuses sides that N does not divide: the rule for those, and the default alpha, are this project's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vision_peft.adapters._lora_like import LoRALike
from vision_peft.adapters._low_rank import Scaling, require_rank
from vision_peft.engine.adapter import Evidence, Factored, FactoredAdapter
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_


class MELoRAAdapter(FactoredAdapter):
    def __init__(self, site: Site, rank: int, minis: int, scale: float, dropout: float) -> None:
        super().__init__()
        out, columns = require_rank(site, rank)
        self.scale, self.dropout = scale, dropout
        self.A = nn.Parameter(torch.zeros(minis, rank // minis, columns // minis))
        self.B = nn.Parameter(torch.zeros(minis, out // minis, rank // minis))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        kaiming_rows_(self.A, evidence.generator)
        self.B.zero_()

    def factored(self, W: Tensor) -> Factored:
        return Factored(self.scale * torch.block_diag(*self.B), torch.block_diag(*self.A), None, self.dropout)


class MELoRA(LoRALike):
    """An ensemble of mini LoRAs.

    Args:
        rank: r of the whole change, a multiple of `minis`.
        alpha, scaling, dropout: as LoRA, with the r of the whole.
        minis: N, how many; 1 is LoRA.
    """

    formula = "r (m + n) / N"
    advice = "high rank at a fraction of LoRA's numbers."

    def __init__(self, rank: int = 8, alpha: float = 8.0, scaling: Scaling = "rank", dropout: float = 0.0, minis: int = 2) -> None:
        if minis < 1 or rank % minis:
            raise UserError(f"adapter.method.minis: {minis} does not divide the rank {rank}")
        super().__init__(rank, alpha, scaling, dropout)
        self.minis = minis

    def adapter(self, site: Site, shared: nn.Module | None) -> MELoRAAdapter:
        return MELoRAAdapter(site, self.rank, self._blocks(site), self.scale, self.dropout)

    def count(self, site: Site) -> int:
        return super().count(site) // self._blocks(site)

    def _blocks(self, site: Site) -> int:
        return math.gcd(self.minis, *site.matrix_shape)
