"""HiRA: a low-rank matrix multiplies the weight entry by entry, so the change has the rank of the weight, not of its factors.

    W' = W * (1 + s B A)    (entry by entry),    A (r, n), B (m, r)

Every entry is scaled by a factor of its own; entries that are zero stay zero. rank(W' - W) can be up to r rank(W).
Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, so W' = W. Trained: A and B, r (m + n) numbers a weight; W is frozen. The changes are
relative to entries well below 1, so it wants a learning rate about ten times LoRA's. There is no dropout: the branch is dense.

Source: Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR 2025; read in the code of
huggingface/peft, which has no scale (s = 1, the default here), and of hhnqqq/MyTransformers, which has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_rank
from vision_peft.engine.adapter import Adapter, Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_


class HiRAAdapter(Adapter):
    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__()
        out, columns = require_rank(site, rank)
        self.scale = scale
        self.A = nn.Parameter(torch.zeros(rank, columns))
        self.B = nn.Parameter(torch.zeros(out, rank))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        kaiming_rows_(self.A, evidence.generator)
        self.B.zero_()

    def weight(self, W: Tensor) -> Tensor:
        return torch.addcmul(W, W, (self.scale * self.B) @ self.A)


class HiRA(Method):
    """Hadamard high-rank adaptation.

    Args:
        rank: r, 1 to min(m, n).
        scale: s.
    """

    kind = "low-rank"
    formula = "r (m + n)"
    advice = "an update of high rank is wanted at LoRA's cost in numbers."

    def __init__(self, rank: int = 8, scale: float = 1.0) -> None:
        if rank < 1:
            raise UserError(f"adapter.method.rank: {rank} is not positive")
        self.rank, self.scale = rank, scale

    def adapter(self, site: Site, shared: nn.Module | None) -> HiRAAdapter:
        return HiRAAdapter(site, self.rank, self.scale)

    def count(self, site: Site) -> int:
        return self.rank * sum(site.matrix_shape)
