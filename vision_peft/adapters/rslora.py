"""rsLoRA: LoRA divided by the square root of its rank, so that a larger rank does not learn more slowly.

    W' = W + s B A,    A (r, n), B (m, r), s = alpha / sqrt(r)

With alpha / r the outputs and gradients of the branch shrink as r grows; with alpha / sqrt(r) their size does not depend on r.
Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, so W' = W. Trained: A and B, r (m + n) numbers a weight; W is frozen.
The same map as LoRA with `scaling: sqrt_rank`, or with alpha sqrt(r) in place of alpha; at r = 1 the two are one.

Source: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732; read in the code of
huggingface/peft. The default alpha is this project's, that of LoRA.
"""

from __future__ import annotations

from vision_peft.adapters._lora_like import LoRALike


class RsLoRA(LoRALike):
    """Rank-stabilised LoRA.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale.
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
    """

    advice = "ranks of 32 and more."

    def __init__(self, rank: int = 8, alpha: float = 8.0, dropout: float = 0.0) -> None:
        super().__init__(rank, alpha, "sqrt_rank", dropout)
