"""Sine-LoRA: the sine of a low-rank matrix, entry by entry, is a matrix of high rank for the same number of parameters.

    W' = W + s sin(omega B A) / g        A (r, n), B (m, r), s = alpha / r, g = sqrt(n) unless given

Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, so W' = W. Trained: r (m + n) numbers a weight. Near the start the update is LoRA's with the
scale s omega / g, so it wants a learning rate smaller by about g / omega. The larger omega, the less low-rank the update.

The sine acts on the weight, as in the paper; there are implementations that take it of the branch's output, which cannot be merged.

Source: Ji et al., "Efficient Learning with Sine-Activated Low-Rank Matrices", ICLR 2025; read in the authors' code
(samy-ji/Sine-Low-Rank), where omega and g are settings without a default: those here are this project's choice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_rank, scale_of
from vision_peft.engine.adapter import Adapter, Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_


class SineLoRAAdapter(Adapter):
    def __init__(self, site: Site, method: SineLoRA) -> None:
        super().__init__()
        out, columns = require_rank(site, method.rank)
        self.omega = method.omega
        self.scale = method.scale / (math.sqrt(columns) if method.gain is None else method.gain)
        self.A = nn.Parameter(torch.zeros(method.rank, columns))
        self.B = nn.Parameter(torch.zeros(out, method.rank))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        kaiming_rows_(self.A, evidence.generator)
        self.B.zero_()

    def weight(self, W: Tensor) -> Tensor:
        return torch.add(W, torch.sin((self.omega * self.B) @ self.A), alpha=self.scale)


class SineLoRA(Method):
    """Sine-activated low-rank adaptation.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale alpha / r.
        omega: frequency of the sine.
        gain: g; null for sqrt(n).
    """

    formula = "r (m + n)"
    advice = "high rank out of low-rank factors at no more numbers."

    def __init__(self, rank: int = 8, alpha: float = 8.0, omega: float = 200.0, gain: float | None = None) -> None:
        if not omega > 0:
            raise UserError(f"adapter.method.omega: {omega} is not positive")
        if gain is not None and not gain > 0:
            raise UserError(f"adapter.method.gain: {gain} is not positive")
        self.rank, self.alpha, self.omega, self.gain = rank, alpha, omega, gain
        self.scale = scale_of(alpha, rank, "rank")

    def adapter(self, site: Site, shared: nn.Module | None) -> SineLoRAAdapter:
        return SineLoRAAdapter(site, self)

    def count(self, site: Site) -> int:
        return self.rank * sum(site.matrix_shape)
