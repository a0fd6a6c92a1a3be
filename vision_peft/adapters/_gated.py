"""What the methods with gated ranks share: a LoRA with a gate at every rank, the step that shrinks its gates, and its pruned form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import LowRankAdapter
from vision_peft.engine.adapter import Evidence, Factored, FactoredAdapter
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.gates import shrink_then_cut, soft_threshold

Prox = Literal["paper", "official"]


class GatedAdapter(LowRankAdapter):
    """W' = W + s B diag(gate) A with gate (r,) ~ N(0, 1) at the start."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(site, rank, scale, dropout)
        self.gate = nn.Parameter(torch.zeros(rank))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        super().initialize(W, evidence)
        self.gate.copy_(torch.randn(len(self.gate), generator=evidence.generator))

    def factored(self, W: Tensor) -> Factored:
        return Factored(self.scale * self.gate * self.B, self.A, None, self.dropout)

    def shrink(self, threshold: float, prox: Prox) -> None:
        """The proximal step of the gates; a no-op at threshold 0."""
        self.gate.copy_((soft_threshold if prox == "paper" else shrink_then_cut)(self.gate, threshold))

    def compact(self) -> PrunedAdapter:
        """The ranks whose gate is not zero, gates folded into B, under the same scale."""
        kept = self.gate.detach().nonzero().flatten()
        return PrunedAdapter((self.gate * self.B)[:, kept], self.A[kept], self.scale)


class PrunedAdapter(FactoredAdapter):
    """W' = W + s B A for factors (out, k), (k, in) that are there already; k may be 0."""

    def __init__(self, B: Tensor, A: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.A, self.B = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        """Its factors are given."""

    def factored(self, W: Tensor) -> Factored:
        return Factored(self.scale * self.B, self.A)


def require_prox(prox: Prox) -> Prox:
    if prox not in ("paper", "official"):
        raise UserError(f"adapter.method.prox: {prox!r} is not one of paper, official")
    return prox


def gates_apart(adapters: Mapping[str, GatedAdapter], gate_lr: float | None = None) -> list[dict[str, Any]]:
    """Optimizer groups: factors, and gates without weight decay, at a rate of their own if one is given."""
    factors = [factor for adapter in adapters.values() for factor in (adapter.A, adapter.B)]
    gates = [adapter.gate for adapter in adapters.values()]
    rate = {} if gate_lr is None else {"lr": gate_lr}
    return [{"params": factors, "name": "adapter"}, {"params": gates, "name": "gates", "weight_decay": 0.0, **rate}]
