"""LoRA+: LoRA whose up-projection learns faster than its down-projection.

    W' = W + s B A,    A (r, n) with learning rate lr,  B (m, r) with learning rate ratio * lr

In a wide layer the two factors should not move at one rate: B starts at zero and has to grow, A starts at random and only turns.
Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, so W' = W. Trained: A and B, r (m + n) numbers a weight; W is frozen. The map is
LoRA's; only the optimizer's groups differ. Warm-up and decay act on both rates, so the ratio holds all the way; choose `lr`
below LoRA's, since it is the rate of A. Embeddings are treated as any other weight: no rate of their own.

Source: Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024; read in the code of
huggingface/peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vision_peft.adapters._lora_like import LoRALike
from vision_peft.adapters._low_rank import Scaling
from vision_peft.engine.adapter import Adapter, Shared
from vision_peft.errors import UserError


class LoRAPlus(LoRALike):
    """LoRA with two learning rates.

    Args:
        rank: r, 1 to min(m, n).
        alpha, scaling, dropout: as LoRA.
        ratio: learning rate of B over that of A, at least 1; 1 is LoRA.
    """

    advice = "LoRA trains too slowly in wide layers."

    def __init__(
        self, rank: int = 8, alpha: float = 8.0, scaling: Scaling = "rank", dropout: float = 0.0, ratio: float = 16.0
    ) -> None:
        if not ratio >= 1:
            raise UserError(f"adapter.method.ratio: {ratio} is below 1")
        super().__init__(rank, alpha, scaling, dropout)
        self.ratio = ratio

    def param_groups(self, adapters: Mapping[str, Adapter], shared: Shared | None, lr: float) -> list[dict[str, Any]]:
        return [
            {"params": [adapter.A for adapter in adapters.values()], "lr": lr, "name": "A"},
            {"params": [adapter.B for adapter in adapters.values()], "lr": lr * self.ratio, "name": "B"},
        ]
