"""OFT: the neurons of a layer are turned together, by a block-diagonal rotation of the inputs.

    W' = W R^T,    R = blockdiag(R_1 .. R_k),    R_i = (I + Q_i)^-1 (I - Q_i),  Q_i (b, b) skew

R (n, n) acts on the input side, y = W R^T x + b: rows of W are the neurons, and one rotation of all of them keeps their lengths and the
angles between them, which is the point of the method (a rotation of the output side would mix neurons). Start: Q = 0, so W' = W.
Trained: the upper triangles, k b (b - 1) / 2 = n (b - 1) / 2 numbers a weight where b divides n; b (b - 1) / 2 if shared by all blocks.
Otherwise k = ceil(n / b) blocks of the size ceil(n / k), of which the last has fewer coordinates. W is frozen; kernels are flattened.

Constrained OFT (`radius`): after every step, each Q_i is pulled back to ||Q_i|| <= radius / sqrt(number of trained blocks).
`magnitude` trains a gain for every neuron on top, W' = diag(g) W R^T with g = 1 at the start, m more numbers.

Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", NeurIPS 2023; the layer of huggingface/peft, whose
truncated Neumann series is replaced by the exact inverse (`use_cayley_neumann=False` there) and which leaves the gain out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.adapters._rotation import RotationBlocks, count_angles
from vision_peft.engine.adapter import Adapter, Clock, Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class OFTAdapter(Adapter):
    def __init__(self, site: Site, method: OFT) -> None:
        super().__init__()
        rows, columns = site.matrix_shape
        self.block_dropout, self.share = method.block_dropout, method.share
        self.blocks = RotationBlocks(method.layout(columns), columns, method.share)
        self.g = nn.Parameter(torch.ones(rows)) if method.magnitude else None

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.blocks.theta.zero_()
        if self.g is not None:
            self.g.fill_(1.0)

    def weight(self, W: Tensor) -> Tensor:
        R = self.blocks(self.block_dropout)
        k, b, _ = R.shape
        parts = F.pad(W, (0, k * b - W.shape[1])).reshape(-1, k, b).transpose(0, 1)  # (k, m, b)
        turned = (parts @ R.mT).transpose(0, 1).reshape(-1, k * b)[:, : W.shape[1]]
        return turned if self.g is None else self.g[:, None] * turned

    def constrain(self, radius: float) -> None:
        """Pull every Q_i into its ball."""
        theta, sign = self.blocks.theta, self.blocks.sign
        size = torch.linalg.matrix_norm(self.blocks.skew())  # (k,)
        if self.share:
            theta.mul_((radius / size.max().clamp(min=1e-12)).clamp(max=1.0))
            return
        shrink = (radius / math.sqrt(len(size)) / size.clamp(min=1e-12)).clamp(max=1.0)
        theta.mul_(shrink[:, None, None].expand_as(sign)[sign > 0])


class OFT(Method):
    """Orthogonal fine-tuning.

    Args:
        block_size: b, inputs that are turned among themselves; larger ones train more.
        share: one rotation for all blocks.
        radius: bound of the norm of Q over all blocks, for constrained OFT; null for none.
        block_dropout: share of the blocks that are the identity at a training step, drawn anew at every step.
        magnitude: train a gain for every neuron.
    """

    kind = "rotation"
    source = "code"
    formula = "n (b - 1) / 2"
    advice = "angles between neurons should be kept, as in adapting generators."
    tiny = {"block_size": 4}

    def __init__(
        self,
        block_size: int = 32,
        share: bool = False,
        radius: float | None = None,
        block_dropout: float = 0.0,
        magnitude: bool = False,
    ) -> None:
        if block_size < 2:
            raise UserError(f"adapter.method.block_size: {block_size} is below 2, and a single input cannot be turned")
        if radius is not None and radius <= 0:
            raise UserError(f"adapter.method.radius: {radius} is not positive")
        if not 0 <= block_dropout < 1:
            raise UserError(f"adapter.method.block_dropout: {block_dropout} is not in [0, 1)")
        self.block_size, self.share, self.radius = block_size, share, radius
        self.block_dropout, self.magnitude = block_dropout, magnitude

    def suits(self, site: Site) -> bool:
        return super().suits(site) and site.matrix_shape[1] > 1  # a single input cannot be turned

    def layout(self, columns: int) -> Tensor:
        """Coordinates (k, b): neighbours form a block."""
        k = math.ceil(columns / self.block_size)
        return torch.arange(k * math.ceil(columns / k)).view(k, -1)

    def adapter(self, site: Site, shared: nn.Module | None) -> OFTAdapter:
        return OFTAdapter(site, self)

    def coordinate(self, adapters: Mapping[str, Adapter], shared: nn.Module | None, clock: Clock) -> None:
        if self.radius is not None:
            for adapter in adapters.values():
                adapter.constrain(self.radius)

    def count(self, site: Site) -> int:
        rows, columns = site.matrix_shape
        return count_angles(self.layout(columns), columns, self.share) + rows * self.magnitude
