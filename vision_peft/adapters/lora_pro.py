"""LoRA-Pro: LoRA whose factor gradients are replaced so that the weight moves as close to the dense gradient as a pair of factors can.

    W' = W + s B A,    A (r, n), B (m, r);   with g_A = s B^T G and g_B = s G A^T, the optimizer is given

    g_A' = (B^T B)^-1 g_A / s^2 + X A
    g_B' = (I - B (B^T B)^-1 B^T) g_B (A A^T)^-1 / s^2 - B X
    X (r, r) solves  B^T B X + X A A^T = -(B^T B)^-1 g_A A^T / s^2

Then s (B g_A' + g_B' A) = P_B G + (I - P_B) G P_A, with P_B and P_A the orthogonal projectors onto the columns of B and the rows of
A: of all changes that moving the two factors can make, the one nearest to G. X drops out of it; this X keeps g_A' and g_B' nearest to
g_A and g_B. 1e-8 I is added before inverting, so at the start, where B = 0, only B moves. The products of size r x r are in float64.
Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, so W' = W. Trained: A and B, r (m + n) numbers a weight; W is frozen.

Adam's moments are those of g_A' and g_B'. The authors' optimizer keeps them on the dense equivalent gradient instead, two tensors of
the size of every weight, and steps without Adam afterwards; that form is not offered, since the optimizer is the task's.

Source: Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", ICLR 2025; read in the code (mrflogs/LoRA-Pro, where
s = 2 is fixed; and hhnqqq/MyTransformers for moments on the factors).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vision_peft.adapters._lora_like import LoRALike, require_alpha
from vision_peft.adapters._low_rank import LowRankAdapter, Scaling
from vision_peft.engine.adapter import Adapter, Clock, Shared

DAMPING = 1e-8


class LoRAPro(LoRALike):
    """LoRA with the equivalent gradient nearest to the dense one.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale, above 0; 16 at rank 8 gives the authors' s = 2.
        scaling, dropout: as LoRA.
    """

    advice = "LoRA's path should follow full fine-tuning's, at the price of small solves a step."

    def __init__(self, rank: int = 8, alpha: float = 16.0, scaling: Scaling = "rank", dropout: float = 0.0) -> None:
        super().__init__(rank, require_alpha(alpha), scaling, dropout)

    def adjust_gradients(self, adapters: Mapping[str, Adapter], shared: Shared | None, clock: Clock) -> None:
        for adapter in adapters.values():
            if adapter.A.grad is not None and adapter.B.grad is not None:
                _replace_gradients(adapter)


def _replace_gradients(adapter: LowRankAdapter) -> None:
    A, B, g_A, g_B = (each.double() for each in (adapter.A, adapter.B, adapter.A.grad, adapter.B.grad))
    lambdas, Q = _eigen(B.mT @ B)
    mus, P = _eigen(A @ A.mT)
    gram_B = Q / (lambdas + DAMPING) @ Q.mT  # (r, r), the inverse of B^T B
    gram_A = P / (mus + DAMPING) @ P.mT
    of_A = gram_B @ g_A / adapter.scale**2  # (r, n), without X
    of_B = (g_B - B @ (gram_B @ (B.mT @ g_B))) @ gram_A / adapter.scale**2  # (m, r)
    # both Gram matrices are symmetric, so in their eigenvectors Sylvester's equation is a division of entries
    X = -Q @ (Q.mT @ of_A @ A.mT @ P / (lambdas[:, None] + mus).clamp(min=DAMPING)) @ P.mT
    adapter.A.grad.copy_(of_A + X @ A)
    adapter.B.grad.copy_(of_B - B @ X)


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp(min=0), vectors
