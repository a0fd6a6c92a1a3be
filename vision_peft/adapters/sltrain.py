"""SLTrain: a weight that is a thin product plus a sparse matrix whose random support never changes; made for training from scratch.

    W' = s B A + S,    S[support] = v, zero elsewhere;    s = alpha / r, or tanh(theta) with `trainable_scaling`

A (r, n), B (m, r), v (k,), k = int(density m n); the support is k of the m n positions, drawn once, sorted, stored with the adapter.
Start: A ~ U(+-1/sqrt(n)), B = 0, v ~ U(+-1/sqrt(n)), theta = 1. The pretrained weight is thrown away: the fresh layer is S alone.
Trained: r (m + n) + k numbers a weight, one more with theta; biases, which the original trains too, stay frozen.

With `pretrained: keep` W' = W + s B A + S and v starts at 0, so that W' = W: a form for fine-tuning that follows from the other, not
from a publication. On linear and attention layers no dense matrix is kept for the backward pass: it is built again.

Source: Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", NeurIPS 2024
(code: andyjm3/SLTrain).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._kernel import recomputed_linear
from vision_peft.adapters._low_rank import require_rank, scale_of
from vision_peft.engine.adapter import Adapter, Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_

Pretrained = Literal["discard", "keep"]


class SLTrainAdapter(Adapter):
    support: Tensor  # (k,) positions in the rows of W, one after another; ascending

    def __init__(self, site: Site, method: SLTrain) -> None:
        super().__init__()
        out, columns = require_rank(site, method.rank)
        self.keeps = method.pretrained == "keep"
        size = out * columns
        self.A = nn.Parameter(torch.zeros(method.rank, columns))
        self.B = nn.Parameter(torch.zeros(out, method.rank))
        self.v = nn.Parameter(torch.zeros(int(method.density * size)))
        if method.trainable_scaling:
            self.theta = nn.Parameter(torch.ones(()))
        self.scale = None if method.trainable_scaling else method.scale
        self.register_buffer("support", torch.zeros(self.v.numel(), dtype=torch.int32 if size < 2**31 else torch.int64))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        kaiming_rows_(self.A, evidence.generator)
        self.B.zero_()
        self.support.copy_(torch.randperm(W.numel(), generator=evidence.generator)[: self.v.numel()].sort().values)
        bound = 0.0 if self.keeps else 1 / math.sqrt(W.shape[1])
        self.v.copy_(bound * (2 * torch.rand(self.v.shape, generator=evidence.generator, dtype=torch.float32) - 1))
        if self.scale is None:
            self.theta.fill_(1.0)

    def weight(self, W: Tensor) -> Tensor:
        update = self.update(*self._tensors())
        return W + update if self.keeps else update

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return recomputed_linear(x, W if self.keeps else None, b, self.update, *self._tensors())

    def update(self, A: Tensor, B: Tensor, v: Tensor, theta: Tensor | None = None) -> Tensor:
        """s B A + S (m, n)."""
        product = (B * (self.scale if theta is None else theta.tanh())) @ A
        return product.view(-1).index_add(0, self.support.long(), v).view_as(product)

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.A, self.B, self.v) if self.scale is not None else (self.A, self.B, self.v, self.theta)


class SLTrain(Method):
    """Sparse plus low-rank weights.

    Args:
        rank: r, 1 to min(m, n).
        density: share of the positions that belong to the support, in [0, 1].
        alpha: numerator of the scale alpha / r; tuned by hand in the paper, from 8 to 32.
        trainable_scaling: train the scale, as tanh(theta); alpha is not used then.
        pretrained: `discard` the pretrained weight, as the original, or `keep` it under the trained part.
    """

    kind = "pre-training"
    formula = "r (m + n) + int(density m n), 1 more with trainable_scaling"
    advice = "pre-training from scratch in little memory: low-rank plus random sparse weights."
    identity_at_init = False

    def __init__(
        self,
        rank: int = 128,
        density: float = 0.03,
        alpha: float = 32.0,
        trainable_scaling: bool = False,
        pretrained: Pretrained = "discard",
    ) -> None:
        if not 0 <= density <= 1:
            raise UserError(f"adapter.method.density: {density} is not in [0, 1]")
        if pretrained not in ("discard", "keep"):
            raise UserError(f"adapter.method.pretrained: {pretrained!r} is not one of discard, keep")
        self.rank, self.density, self.alpha, self.trainable_scaling, self.pretrained = rank, density, alpha, trainable_scaling, pretrained
        self.scale = scale_of(alpha, rank, "rank")
        self.identity_at_init = pretrained == "keep"

    def adapter(self, site: Site, shared: nn.Module | None) -> SLTrainAdapter:
        return SLTrainAdapter(site, self)

    def count(self, site: Site) -> int:
        out, columns = site.matrix_shape
        return self.rank * (out + columns) + int(self.density * (out * columns)) + self.trainable_scaling
