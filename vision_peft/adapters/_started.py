"""What methods share that differ from LoRA in the start alone: a pair of factors, less the pair it started from.

    W' = W + s (B A - B0 A0)        A, A0 (r, n), B, B0 (m, r)

The papers write W - s B0 A0 into the frozen weight. Here W stays as it is, which is the same map: nothing of the backbone has to be
saved again, adapters on one backbone do not disturb each other, and the result is a plain LoRA of rank 2 r, s [B, -B0] [A; A0].
Weight decay on A and B draws W' to W - s B0 A0, not to W: the settings in configs/ have none.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vision_peft.adapters._lora_like import LoRALike, require_alpha
from vision_peft.adapters._low_rank import LowRankAdapter, Scaling
from vision_peft.engine.adapter import Factored
from vision_peft.engine.site import Site
from vision_peft.linalg.init import kaiming_rows_


class StartedAdapter(LowRankAdapter):
    """W' = W + s (B A - B0 A0) with a start that a subclass chooses.

    Args:
        offset: whether the start is subtracted; if not, W' = W + s B A.
        stored: whether the start is saved, because it came from evidence; else it is recomputed from W or the seed on load.
    """

    A0: Tensor | None  # (r, n)
    B0: Tensor | None  # (m, r)

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, *, offset: bool = True, stored: bool = False) -> None:
        super().__init__(site, rank, scale, dropout)
        self.stored = stored
        self.register_buffer("A0", torch.zeros_like(self.A.data) if offset else None, persistent=stored)
        self.register_buffer("B0", torch.zeros_like(self.B.data) if offset else None, persistent=stored)

    def start_at(self, B: Tensor, A: Tensor) -> None:
        self.A.copy_(A)
        self.B.copy_(B)
        if self.A0 is not None:
            self.A0.copy_(self.A)
            self.B0.copy_(self.B)

    def start_empty(self) -> None:
        """For values that are about to be loaded."""
        self.start_at(torch.zeros_like(self.B), torch.zeros_like(self.A))

    def factored(self, W: Tensor) -> Factored:
        B = self.scale * self.B
        if self.A0 is None:
            return Factored(B, self.A, None, self.dropout)
        rank = self.A.shape[0]
        return Factored(torch.cat([B, -self.scale * self.B0], 1), torch.cat([self.A, self.A0]), None, self.dropout, trained=rank)

    def fingerprint(self) -> Tensor | None:
        return None if self.stored or self.A0 is None else self.scale * product_mark(self.B0, self.A0)


class RankedAdapter(StartedAdapter):
    """R ranks are there, the first k of them act; k is decided across layers and kept as a mask."""

    mask: Tensor  # (R,): k ones, then zeros

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, *, offset: bool = False) -> None:
        super().__init__(site, rank, scale, dropout, offset=offset, stored=True)
        self.register_buffer("mask", torch.ones(rank))

    def keep(self, k: int) -> None:
        self.mask.copy_(torch.arange(self.mask.numel()) < k)

    def factored(self, W: Tensor) -> Factored:
        form = super().factored(W)
        return form._replace(B=form.B * (self.mask if self.A0 is None else self.mask.repeat(2)))

    def compact(self) -> RankedAdapter:
        """The ranks that act."""
        small, kept = copy.deepcopy(self), self.mask > 0
        small.A, small.B = nn.Parameter(self.A.detach()[kept]), nn.Parameter(self.B.detach()[:, kept])
        small.mask = self.mask[kept]
        if self.A0 is not None:
            small.A0, small.B0 = self.A0[kept], self.B0[:, kept]
        return small


class Started(LoRALike):
    """LoRA's arguments for a start that is divided by the scale, which must not be zero then."""

    def __init__(self, rank: int = 8, alpha: float = 8.0, scaling: Scaling = "rank", dropout: float = 0.0) -> None:
        super().__init__(rank, require_alpha(alpha), scaling, dropout)


def split_values(U: Tensor, S: Tensor, Vh: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """B (m, r), A (r, n) with s B A = U diag(S) Vh, each with the root of the values.

    A value of zero would make a pair that can never move; the offset makes a small one instead free.
    """
    floor = max(1e-6 * float(S.max()), 1e-12)
    root = (S.clamp(min=floor) / scale).sqrt()
    return U * root, root[:, None] * Vh


def lora_start(adapter: LowRankAdapter, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """B = 0 and a random A, where evidence gives no direction at all."""
    return torch.zeros_like(adapter.B), kaiming_rows_(torch.empty_like(adapter.A), generator)


def product_mark(B: Tensor, A: Tensor) -> Tensor:
    """Two numbers of the product B A, whatever the factors: equal under signs of pairs and under any change of basis inside."""

    def probes(length: int, shift: float) -> Tensor:
        frequencies = torch.tensor([1.0, 1.9], device=B.device, dtype=B.dtype) + shift
        return torch.cos(frequencies[:, None] * torch.arange(length, device=B.device, dtype=B.dtype) + 0.5)  # (2, length)

    return ((probes(B.shape[0], 0.0) @ B) * (probes(A.shape[1], 0.7) @ A.mT)).sum(1)
