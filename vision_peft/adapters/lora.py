"""LoRA: the update of a weight is a product of two thin matrices.

    y = W x + b + s B A drop(x)        A (r, n), B (m, r), s = alpha / r  or  alpha / sqrt(r)

Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, so W' = W. Trained: A and B, r (m + n) numbers a weight; W and b are frozen.
Kernels are flattened to (out, in/groups * kh * kw). `scaling: sqrt_rank` is the rank-stabilised form (rsLoRA), which the
CLIP few-shot protocol uses with r = 2, alpha = 1, dropout 0.25.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; Kalajdzievski, "A Rank Stabilization
Scaling Factor for Fine-Tuning with LoRA", 2023; Zanella and Ben Ayed, CLIP-LoRA, 2024 (code: MaxZanella/CLIP-LoRA).
"""

from __future__ import annotations

from vision_peft.adapters._lora_like import LoRALike


class LoRA(LoRALike):
    """Low-rank adaptation.

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale.
        scaling: `rank` for alpha / r, `sqrt_rank` for alpha / sqrt(r).
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
    """

    formula = "r (m + n)"
    advice = "nothing is known yet: the default to beat."
