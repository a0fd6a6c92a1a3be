"""LoRA-GA: LoRA that starts at singular vectors of the gradient, so that its first step is close to the one of full fine-tuning.

    W' = W + s (B A - B0 A0),    G = U diag(sigma) V^T the mean gradient of the loss in W over calibration batches

Start, `direction: ArB2r`: A = A0 = c V[:, :r]^T, B = B0 = c U[:, r:2r]; hence W' = W. A (r, n) and B (m, r) are trained, r (m + n)
numbers a weight; W, A0 and B0 are frozen. A0 and B0 come from data and are stored with the adapter. Where min(m, n) < 2 r, the two
groups of vectors overlap as little as they can.

    direction   B                      A                      of the first 2 r vectors
    ArB2r       second half            first half
    A2rBr       first half             second half
    ArBr        numbers 0, 2, 4, ...   numbers 1, 3, 5, ...

    size        c
    stable      m^(1/4) / sqrt(gamma)
    gd          1 / s
    unit        1
    weightS     mean over i < r of sqrt(sigma_i(W) / s)

`norm_clip` shrinks the start until no entry of s B0 A0 is larger than the largest of W. The SVD is exact, in place of a randomised one.

Source: Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024, arXiv 2407.05000 (code:
Outsider565/LoRA-GA, read). huggingface/peft and hhnqqq/MyTransformers scale otherwise: the official code is followed, alpha and
scaling are those of its commands.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vision_peft.adapters._low_rank import Scaling
from vision_peft.adapters._started import Started, StartedAdapter
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.svd import thin_svd
from vision_peft.linalg.svd_cache import cached_svd

Direction = Literal["ArB2r", "A2rBr", "ArBr"]
Size = Literal["stable", "gd", "unit", "weightS"]


class LoRAGAAdapter(StartedAdapter):
    def __init__(self, site: Site, method: LoRAGA) -> None:
        super().__init__(site, method.rank, method.scale, method.dropout, stored=True)
        self.direction, self.size, self.gamma, self.norm_clip = method.direction, method.size, method.gamma, method.norm_clip

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        if evidence.gradient is None:
            return self.start_empty()
        U, _, Vh = thin_svd(evidence.gradient.to(W))
        for_B, for_A = self._chosen(len(Vh))
        size = self._size(W)
        B, A = size * U[:, for_B], size * Vh[for_A]
        if self.norm_clip:
            ratio = (W.abs().max() / (self.scale * B @ A).abs().max()).clamp(1e-8, 1.0)
            B, A = ratio.sqrt() * B, ratio.sqrt() * A
        self.start_at(B, A)

    def _chosen(self, vectors: int) -> tuple[list[int], list[int]]:
        """Which singular vectors B and A start at: the ends of one order, so that few are common where there are few."""
        rank = self.A.shape[0]
        order = list(range(min(2 * rank, vectors)))
        if self.direction == "ArBr":
            order = order[::2] + order[1::2]
        first, last = order[:rank], order[-rank:]
        return (last, first) if self.direction == "ArB2r" else (first, last)

    def _size(self, W: Tensor) -> float:
        if self.size == "stable":
            return W.shape[0] ** 0.25 / self.gamma**0.5
        if self.size == "weightS":
            return float((cached_svd(W).S[: self.A.shape[0]] / self.scale).sqrt().mean())
        return 1 / self.scale if self.size == "gd" else 1.0


class LoRAGA(Started):
    """Gradient approximation.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale.
        scaling: `rank` for alpha / r, `sqrt_rank` for alpha / sqrt(r).
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
        direction: which singular vectors each factor starts at.
        size: how long they are made.
        gamma: of `stable`, positive; larger is a smaller start.
        norm_clip: keep the start below the weight's largest entry.
    """

    advice = "LoRA starts too slowly: a calibration gradient points the first steps."
    evidence = ("gradient",)

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        scaling: Scaling = "sqrt_rank",
        dropout: float = 0.0,
        direction: Direction = "ArB2r",
        size: Size = "stable",
        gamma: float = 16.0,
        norm_clip: bool = False,
    ) -> None:
        super().__init__(rank, alpha, scaling, dropout)
        if direction not in ("ArB2r", "A2rBr", "ArBr"):
            raise UserError(f"adapter.method.direction: {direction!r} is not one of ArB2r, A2rBr, ArBr")
        if size not in ("stable", "gd", "unit", "weightS"):
            raise UserError(f"adapter.method.size: {size!r} is not one of stable, gd, unit, weightS")
        if not gamma > 0:
            raise UserError(f"adapter.method.gamma: {gamma} is not positive")
        self.direction, self.size, self.gamma, self.norm_clip = direction, size, gamma, norm_clip

    def adapter(self, site: Site, shared: nn.Module | None) -> LoRAGAAdapter:
        return LoRAGAAdapter(site, self)
