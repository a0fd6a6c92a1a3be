"""C3A: the update is a circular convolution, a matrix of circulant blocks of which each trains its first row.

    W' = W + C / n,     C[b p + i, b q + j] = w[p, q, (j - i) mod b],   i, j = 0 ... b - 1

W (m, n); w (m/b, n/b, b) trained: m n / b numbers a weight, whatever rank the update has (up to full). b is the largest common divisor of
m and n that does not exceed `block_size`, so q, k and v of width 384 have b = 192 at the default of 256; where m and n have no common
divisor, b = 1 and every entry is trained. Start: w = 0, so W' = W (the authors find that random starts do no better). The blocks are laid
out in the weight directly, without Fourier transforms: on a merged weight that is cheaper than convolving every token.

Source: Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", arXiv 2407.19342; read from the layer of huggingface/peft,
against which it is checked. The choice of b where block_size does not divide the layer is this project's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vision_peft.adapters._random_bases import require_positive
from vision_peft.engine.adapter import Adapter, Evidence, Method
from vision_peft.engine.site import Site


class C3AAdapter(Adapter):
    def __init__(self, site: Site, block: int) -> None:
        super().__init__()
        out, columns = site.matrix_shape
        self.w = nn.Parameter(torch.zeros(out // block, columns // block, block))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.w.zero_()

    def weight(self, W: Tensor) -> Tensor:
        block = self.w.shape[-1]
        # windows of the row written twice: the one that begins at b - i is the row shifted right by i
        windows = torch.cat([self.w, self.w], dim=-1).unfold(-1, block, 1)[..., 1:, :]  # (m/b, n/b, b, b), the last window is row 0
        circulants = windows.flip(-2).transpose(1, 2)  # (m/b, b, n/b, b)
        return torch.add(W, circulants.reshape(W.shape), alpha=1 / W.shape[1])


class C3A(Method):
    """Block-circular convolution adaptation.

    Args:
        block_size: b at most; larger blocks train fewer numbers.
    """

    formula = "m n / b"
    advice = "high rank is wanted at a vector's cost and the widths have a common divisor."

    def __init__(self, block_size: int = 256) -> None:
        self.block_size = require_positive("block_size", block_size)

    def block(self, site: Site) -> int:
        common = math.gcd(*site.matrix_shape)
        return max(b for b in range(1, min(common, self.block_size) + 1) if common % b == 0)

    def adapter(self, site: Site, shared: nn.Module | None) -> C3AAdapter:
        return C3AAdapter(site, self.block(site))

    def count(self, site: Site) -> int:
        out, columns = site.matrix_shape
        return out * columns // self.block(site)
