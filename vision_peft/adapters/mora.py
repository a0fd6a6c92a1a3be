"""MoRA: one small square matrix instead of two thin factors, for the same number of trained numbers and a far higher rank.

    W' = W + D M C,    M (q, q) trained, q = round(sqrt((m + n) r)) and at most min(m, n)

C (q, n) compresses, D (m, q) expands; both are fixed and hold zeros and ones. The inputs are cut into chunks of q, the last one filled up
with inputs from the front, and the chunks are added; the outputs of M are repeated until there are m of them. So

    (W' - W)[o, i] = M[o mod q, i mod q],    plus M[o mod q, p mod q] for every filled-up place p = n, n + 1, ... that repeats input i.

Start: M = 0, so W' = W. Trained: q^2 numbers a weight, near the r (m + n) of a LoRA; there is no scale. The bound on q, which keeps all of
M in use on small layers, is this project's. This is the paper's "sharing" type; the one with rotations is not offered, because its
angles were not in what was read.

Source: Jiang et al., "MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning", arXiv 2405.12130; read in the code of
hhnqqq/MyTransformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_rank
from vision_peft.engine.adapter import Adapter, Evidence, Factored, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class MoRAAdapter(Adapter):
    rows: Tensor  # (m,), the row of M that each output reads
    C: Tensor  # (q, n)

    def __init__(self, site: Site, size: int) -> None:
        super().__init__()
        out, columns = site.matrix_shape
        self.M = nn.Parameter(torch.zeros(size, size))
        places = torch.arange(-(-columns // size) * size)  # a whole number of chunks
        C = torch.zeros(size, columns).index_put((places % size, places % columns), torch.ones(()), accumulate=True)
        self.register_buffer("rows", torch.arange(out) % size, persistent=False)
        self.register_buffer("C", C, persistent=False)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.M.zero_()

    def weight(self, W: Tensor) -> Tensor:
        return W + (self.M @ self.C)[self.rows]

    def factored(self, W: Tensor) -> Factored | None:
        # two thin products a token beat a dense weight gradient only while q is small
        return Factored(self.M[self.rows], self.C) if 2 * self.M.shape[0] <= min(W.shape) else None


class MoRA(Method):
    """High-rank updating by a square matrix.

    Args:
        rank: r of the LoRA whose count of trained numbers it has, 1 to min(m, n).
    """

    kind = "dense"
    formula = "q^2, q = round(sqrt(r (m + n))), at most min(m, n)"
    advice = "a square matrix of high rank at LoRA's number of numbers."

    def __init__(self, rank: int = 8) -> None:
        if rank < 1:
            raise UserError(f"adapter.method.rank: {rank} is not positive")
        self.rank = rank

    def adapter(self, site: Site, shared: nn.Module | None) -> MoRAAdapter:
        return MoRAAdapter(site, self._size(site))

    def count(self, site: Site) -> int:
        return self._size(site) ** 2

    def _size(self, site: Site) -> int:
        out, columns = require_rank(site, self.rank)
        return min(int(math.sqrt((out + columns) * self.rank) + 0.5), out, columns)
