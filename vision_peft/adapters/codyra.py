"""CoDyRA: every rank of an update has an importance; after a dense phase a rising threshold drops the unimportant ranks.

    W' = W + B diag(w) A        A (r, n), B (m, r), w (r,), no further scale
    after optimizer step t > D:   w <- T(w),  T(x) = sign(x) max(|x| - kappa_t, 0)

Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, w ~ N(0, 1), so W' = W. Trained: A, B and w, r (m + n + 1) numbers a weight; W is frozen.
kappa goes through even levels from 0 to `kappa`: D = dense * T, one level up at every t >= D that floor((T - D) / levels) divides,
and it is not scaled by the learning rate. In the paper's 500 steps the thresholds add up to 0.65, so without a gradient the ranks
with |w| > 0.65 survive, about half: the first draw has a say in the rank. Shorter runs need fewer levels and a larger `kappa`.
w is kept free of weight decay. `compact()` keeps the k ranks whose w is not zero, k (m + n) numbers.

The update is meant to be learned for one task of a sequence and merged before the next, which starts anew at the full rank.

Source: "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language Models with Dynamic
Rank-Selective LoRA", arXiv 2412.01004 (code: Artificer-AI-Lab/CoDyRA and the project page). The code's operator also cuts what is
below twice the threshold (`prox: official`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from vision_peft.adapters._gated import GatedAdapter, Prox, gates_apart, require_prox
from vision_peft.engine.adapter import Clock, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class CoDyRA(Method):
    """Dynamic rank-selective LoRA.

    Args:
        rank: r at the start, 1 to min(m, n).
        kappa: the last and largest threshold.
        levels: number of thresholds, evenly from 0 to kappa.
        dense: share of the run without a threshold.
        prox: `paper` for the soft threshold, `official` for the map of the code.
    """

    low_rank = True
    kind = "gated"
    formula = "r (m + n + 1)"
    advice = "the same CLIP is adapted to one task after another and must not forget: unimportant ranks are dropped before each merge."

    def __init__(self, rank: int = 16, kappa: float = 5e-3, levels: int = 50, dense: float = 0.5, prox: Prox = "paper") -> None:
        if rank < 1:
            raise UserError(f"adapter.method.rank: {rank} is not positive")
        if kappa < 0:
            raise UserError(f"adapter.method.kappa: {kappa} is negative")
        if levels < 2:
            raise UserError(f"adapter.method.levels: {levels} is less than 2")
        if not 0 <= dense < 1:
            raise UserError(f"adapter.method.dense: {dense} is not in [0, 1)")
        self.rank, self.kappa, self.levels, self.dense, self.prox = rank, kappa, levels, dense, require_prox(prox)

    def adapter(self, site: Site, shared: nn.Module | None) -> GatedAdapter:
        return GatedAdapter(site, self.rank, scale=1.0)

    def coordinate(self, adapters: Mapping[str, GatedAdapter], shared: nn.Module | None, clock: Clock) -> None:
        if clock.step == 1 and not self._steps_a_level(clock.total):
            late = clock.total - math.ceil(self._dense_steps(clock.total))
            warnings.warn(f"CoDyRA: the last {late} steps are too few for {self.levels} levels, so no rank is dropped", stacklevel=2)
        threshold = self.threshold(clock.step - 1, clock.total)
        for adapter in adapters.values():
            adapter.shrink(threshold, self.prox)

    def threshold(self, t: int, total: int) -> float:
        """What the gates shrink by after the optimizer step of iteration t = 0 to total - 1."""
        dense, stride = self._dense_steps(total), self._steps_a_level(total)
        if not stride or t <= dense:
            return 0.0
        level = t // stride - (math.ceil(dense) - 1) // stride  # multiples of the stride from dense to t
        return self.kappa * min(level, self.levels - 1) / (self.levels - 1)

    def _dense_steps(self, total: int) -> float:
        return round(self.dense * total, 6)  # 0.55 * 100 is a little more than 55

    def _steps_a_level(self, total: int) -> int:
        return int((total - self._dense_steps(total)) // self.levels)

    def param_groups(self, adapters: Mapping[str, GatedAdapter], shared: nn.Module | None, lr: float) -> list[dict[str, Any]]:
        return gates_apart(adapters)

    def count(self, site: Site) -> int:
        return self.rank * (sum(site.matrix_shape) + 1)
