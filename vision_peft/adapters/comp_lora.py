"""Comp-LoRA: LoRA in the subspace complementary to the principal directions of the pretrained weight.

    W' = W + s (P_out B)(A P_in),    P_out = I - U_k U_k^T,  P_in = I - V_k V_k^T

A (r, n), B (m, r), s = alpha / sqrt(r); U_k (m, k), V_k (n, k): leading singular vectors of W, frozen, recomputed from W on load.
Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, so W' = W. Trained: r (m + n) numbers a weight, as LoRA. With both sides projected
every protected triplet of W remains a singular triplet of W'. The projection is in the forward map, not on the gradient, so
AdamW's scaling cannot push the effective update out of the complement. q, k and v are decomposed each for itself.

Source: "Complementary Subspace Low-Rank Adaptation of Vision-Language Models for Few-Shot Classification", arXiv 2501.15040;
reconstructed from the abstract: the number k of protected directions (here by energy), the two-sided projection and its place
in the forward map are this project's reading.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import LowRankAdapter, Scaling, require_dropout, scale_of
from vision_peft.engine.adapter import Evidence, Factored, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.svd import basis_mark, energy_rank
from vision_peft.linalg.svd_cache import cached_svd

Sides = Literal["both", "in", "out"]


class CompLoRAAdapter(LowRankAdapter):
    U: Tensor  # (m, k)
    Vh: Tensor  # (k, n)

    def __init__(self, site: Site, method: CompLoRA) -> None:
        super().__init__(site, method.rank, method.scale, method.dropout)
        self.sides, self.energy, self.protect_rank = method.sides, method.protect_energy, method.protect_rank
        self.register_buffer("U", None, persistent=False)
        self.register_buffer("Vh", None, persistent=False)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        super().initialize(W, evidence)
        U, S, Vh = cached_svd(W)
        k = energy_rank(S, self.energy) if self.protect_rank is None else self.protect_rank
        k = min(k, S.numel() - self.A.shape[0])  # the complement must hold at least r dimensions
        self.U, self.Vh = U[:, :k].contiguous(), Vh[:k].contiguous()

    def factored(self, W: Tensor) -> Factored:
        A, B = self.A, self.B
        if self.sides != "in":
            B = B - self.U @ (self.U.mT @ B)
        if self.sides != "out":
            A = A - (A @ self.Vh.mT) @ self.Vh
        return Factored(self.scale * B, A, None, self.dropout)

    def fingerprint(self) -> Tensor:
        return torch.cat([basis_mark(self.U, self.U.mT), basis_mark(self.Vh.mT, self.Vh)])


class CompLoRA(Method):
    """Complementary-subspace LoRA.

    Args:
        rank: r.
        alpha, scaling, dropout: as LoRA; the defaults are the CLIP few-shot protocol's.
        protect_energy: protect the fewest directions that hold this share of the squared singular values, in (0, 1].
        protect_rank: protect this many instead, as far as r dimensions remain; 0 is plain LoRA.
        sides: which projectors act.
    """

    low_rank = True
    kind = "low-rank"
    source = "abstract"
    formula = "r (m + n)"
    advice = "zero-shot knowledge should survive few-shot training: the weights' principal directions are left alone."

    def __init__(
        self,
        rank: int = 2,
        alpha: float = 1.0,
        scaling: Scaling = "sqrt_rank",
        dropout: float = 0.25,
        protect_energy: float = 0.9,
        protect_rank: int | None = None,
        sides: Sides = "both",
    ) -> None:
        if not 0 < protect_energy <= 1:
            raise UserError(f"adapter.method.protect_energy: {protect_energy} is not in (0, 1]")
        if protect_rank is not None and protect_rank < 0:
            raise UserError(f"adapter.method.protect_rank: {protect_rank} is negative")
        if sides not in ("both", "in", "out"):
            raise UserError(f"adapter.method.sides: {sides!r} is not one of both, in, out")
        self.rank, self.alpha, self.scaling, self.dropout = rank, alpha, scaling, require_dropout(dropout)
        self.protect_energy, self.protect_rank, self.sides = protect_energy, protect_rank, sides
        self.scale = scale_of(alpha, rank, scaling)

    def adapter(self, site: Site, shared: nn.Module | None) -> CompLoRAAdapter:
        return CompLoRAAdapter(site, self)

    def count(self, site: Site) -> int:
        return self.rank * sum(site.matrix_shape)
