"""BOFT: the rotation of the inputs is a product of sparse ones, wired like a fast Fourier transform.

    W' = diag(g) W (R_m ... R_2 R_1)^T,    R_j (n, n) orthogonal, of n / b blocks (b, b) between distant inputs

Factor j joins half-blocks of b / 2 neighbouring inputs in pairs whose distance is 2^(j - 1) half-blocks: the first factor is OFT's block
diagonal, every further one doubles the reach, and m = 1 + log2(n / b) factors connect every input to every other with m n (b - 1) / 2
angles. Blocks are Cayley's, (I + Q)^-1 (I - Q) with Q skew; g (m,) is a gain for every neuron. Start: Q = 0, g = 1, so W' = W.
Trained: factors * n (b - 1) / 2 + rows numbers a weight where b 2^(factors - 1) divides n; W is frozen, kernels are flattened.
Where it does not, n is padded to the next multiple, and blocks leave the padding alone. A weight with fewer inputs than
b 2^(factors - 1) gets as many factors as fit, at least one.

Source: Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", ICLR 2024; order, pairing, gain and dropout
as in the authors' layer in huggingface/peft.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.adapters._rotation import RotationBlocks, count_angles
from vision_peft.engine.adapter import Adapter, Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class BOFTAdapter(Adapter):
    def __init__(self, site: Site, method: BOFT) -> None:
        super().__init__()
        rows, columns = site.matrix_shape
        self.half, self.block_dropout = method.block_size // 2, method.block_dropout
        layouts = method.layouts(columns)
        self.width = layouts[0].numel()  # n, padded
        self.factors = nn.ModuleList(RotationBlocks(layout, columns) for layout in layouts)
        self.g = nn.Parameter(torch.ones(rows)) if method.magnitude else None

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        for factor in self.factors:
            factor.theta.zero_()
        if self.g is not None:
            self.g.fill_(1.0)

    def weight(self, W: Tensor) -> Tensor:
        dropping = int(torch.randint(len(self.factors), ())) if self.training and self.block_dropout else None
        turned = F.pad(W, (0, self.width - W.shape[1]))
        for j, factor in enumerate(self.factors):
            R = factor(self.block_dropout if j == dropping else 0.0)  # (k, b, b)
            # inputs as (group, first or second of the pair, which pair of the group, place in the half-block)
            pairs = turned.reshape(len(W), -1, 2, 2**j, self.half).permute(1, 3, 0, 2, 4)
            groups, reach, rows, _, half = pairs.shape
            blocks = pairs.reshape(groups * reach, rows, 2 * half) @ R.mT  # (k, rows, b)
            turned = blocks.view(groups, reach, rows, 2, half).permute(2, 0, 3, 1, 4).reshape(rows, self.width)
        turned = turned[:, : W.shape[1]]
        return turned if self.g is None else self.g[:, None] * turned


class BOFT(Method):
    """Butterfly orthogonal fine-tuning.

    Args:
        block_size: b, even.
        factors: of the product; 1 is OFT with the gain.
        block_dropout: share of the blocks of one factor, drawn anew at every training step, that are the identity.
        magnitude: train a gain for every neuron.
    """

    kind = "rotation"
    source = "code"
    formula = "factors * n (b - 1) / 2 + m"
    advice = "orthogonal adaptation should mix all inputs with fewer numbers than OFT at equal block size."

    def __init__(self, block_size: int = 4, factors: int = 2, block_dropout: float = 0.0, magnitude: bool = True) -> None:
        if block_size < 2 or block_size % 2:
            raise UserError(f"adapter.method.block_size: {block_size} is not a positive even number")
        if factors < 1:
            raise UserError(f"adapter.method.factors: {factors} is not positive")
        if not 0 <= block_dropout < 1:
            raise UserError(f"adapter.method.block_dropout: {block_dropout} is not in [0, 1)")
        self.block_size, self.factors, self.block_dropout, self.magnitude = block_size, factors, block_dropout, magnitude

    def suits(self, site: Site) -> bool:
        return super().suits(site) and site.matrix_shape[1] > 1  # a single input cannot be turned

    def layouts(self, columns: int) -> list[Tensor]:
        """Coordinates (k, b) of each factor's blocks."""
        factors = min(self.factors, 1 + int(math.log2(max(1, columns // self.block_size))))
        group = self.block_size * 2 ** (factors - 1)
        inputs = torch.arange(math.ceil(columns / group) * group)
        return [inputs.view(-1, 2, 2**j, self.block_size // 2).transpose(1, 2).reshape(-1, self.block_size) for j in range(factors)]

    def adapter(self, site: Site, shared: nn.Module | None) -> BOFTAdapter:
        return BOFTAdapter(site, self)

    def count(self, site: Site) -> int:
        rows, columns = site.matrix_shape
        return sum(count_angles(layout, columns) for layout in self.layouts(columns)) + rows * self.magnitude
