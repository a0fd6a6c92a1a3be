"""What LoRA-XS and LoRA-SB share: a small trained matrix between two frozen ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_rank
from vision_peft.engine.adapter import Factored, FactoredAdapter
from vision_peft.engine.site import Site


class CoreAdapter(FactoredAdapter):
    """W' = W + s B R A with R (r, r) trained; A (r, n) and B (m, r) are buffers, saved if `saved`."""

    A: Tensor
    B: Tensor

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, saved: bool) -> None:
        super().__init__()
        out, columns = require_rank(site, rank)
        self.scale, self.dropout = scale, dropout
        self.R = nn.Parameter(torch.zeros(rank, rank))
        self.register_buffer("A", torch.zeros(rank, columns), persistent=saved)
        self.register_buffer("B", torch.zeros(out, rank), persistent=saved)

    def factored(self, W: Tensor) -> Factored:
        # R goes to the left, so that the right factor needs no gradient
        return Factored(self.B @ (self.scale * self.R), self.A, None, self.dropout)
