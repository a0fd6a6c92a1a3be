"""Trained factors that several layers share, each taking the part that fits it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Shared
from vision_peft.engine.site import Site
from vision_peft.linalg.init import kaiming_rows_


class SharedFactors(Shared):
    """A (r, largest n) ~ U(-1/sqrt(n), 1/sqrt(n)) and B (largest m, r) = 0, trained, or one of the two.

    A layer with m rows and n columns uses the first n columns of A and the first m rows of B.
    """

    A: nn.Parameter | None
    B: nn.Parameter | None

    def __init__(self, sites: Sequence[Site], rank: int, share_a: bool = True, share_b: bool = True) -> None:
        super().__init__()
        rows, columns = (max(site.matrix_shape[side] for site in sites) for side in (0, 1))
        self.A = nn.Parameter(torch.zeros(rank, columns)) if share_a else None
        self.B = nn.Parameter(torch.zeros(rows, rank)) if share_b else None

    def initialize(self, generator: torch.Generator) -> None:
        if self.A is not None:
            kaiming_rows_(self.A, generator)
        if self.B is not None:
            self.B.zero_()

    def down(self, columns: int) -> Tensor:
        return self.A[:, :columns]

    def up(self, rows: int) -> Tensor:
        return self.B[:rows]
