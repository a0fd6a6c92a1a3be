"""SoRA: LoRA with a gate at every rank, which a proximal step drives to exactly zero; what is left is a smaller LoRA.

    W' = W + s B diag(g) A        A (r, n), B (m, r), g (r,), s = alpha / r with the full r, also after pruning
    after every optimizer step:   g <- T(g),  T(x) = sign(x) max(|x| - xi, 0)

Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, g ~ N(0, 1), so W' = W. Trained: A, B and g, r (m + n) + r numbers a weight; W is frozen.
The gates are in a group of their own without weight decay, and the shrink comes once an optimizer step. A gate at zero still
gets a gradient, so a rank may come back. `compact()` keeps the k ranks whose gate is not zero: a LoRA of k (m + n) numbers.

A step shrinks every gate by xi at most, so ranks can only die if the sum of xi over the run is of order 1, the size of the first
gates; a run in which it stays below 0.1 is warned. With `phases` > 1 xi rises in steps from xi_min to xi (the "sparsifying
scheduler"), the first one longer than the others: combine it with `schedule: constant`, or the last phases only shrink.
The gradient step is torch's AdamW, whose epsilon stands elsewhere than in the AdamW of the official code.

Source: Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023 (code: TsinghuaC3I/SoRA, read and run;
of the paper the abstract). The code's shrink is not the soft threshold: it also cuts what is below 2 xi (`prox: official`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from vision_peft.adapters._gated import GatedAdapter, Prox, gates_apart, require_prox
from vision_peft.adapters._low_rank import require_dropout, scale_of
from vision_peft.engine.adapter import Clock, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError

Spacing = Literal["linear", "log_linear", "exp_linear"]


class SoRAAdapter(GatedAdapter):
    def __init__(self, site: Site, method: SoRA) -> None:
        super().__init__(site, method.rank, method.scale, method.dropout)
        self.l1 = method.l1
        self.gates_in_all = method.rank  # of all sites, once allocate() has counted them

    def penalty(self) -> Tensor | float:
        return self.l1 / self.gates_in_all * self.gate.abs().sum() if self.l1 else 0.0


class SoRA(Method):
    """Sparse low-rank adaptation.

    Args:
        rank: r before pruning.
        alpha: numerator of the scale alpha / r.
        dropout: as LoRA.
        xi: threshold of a step; with several phases the last one's.
        gate_lr: learning rate of the gates; null for that of the factors. Short runs need both higher, in the ratio of the
            official scripts: xi = 3e-4 at a rate of 8e-4.
        xi_scale: `const` takes xi as it is, `lr` times the present learning rate of the gates.
        prox: `paper` for the soft threshold, `official` for the map of the code.
        l1: weight of a penalty, the mean of |g| over all gates, in addition to the threshold; the official scripts use 10 or 0.001.
        phases: number of thresholds from xi_min to xi; 1 keeps xi.
        xi_min: threshold of the first phase, where there are several.
        spacing: of the thresholds: evenly, as logarithm of even exponentials, or as exponential of even logarithms (xi_min > 0).
        first_phase: share of the run that the first of several phases takes; the others share the rest evenly.
    """

    low_rank = True
    kind = "gated"
    formula = "r (m + n) + r"
    advice = "the rank should be found by training: start high, prune at export."

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        xi: float = 3e-4,
        gate_lr: float | None = None,
        xi_scale: Literal["const", "lr"] = "const",
        prox: Prox = "paper",
        l1: float = 0.0,
        phases: int = 1,
        xi_min: float = 0.0,
        spacing: Spacing = "linear",
        first_phase: float = 5 / 14,
    ) -> None:
        if xi < 0:
            raise UserError(f"adapter.method.xi: {xi} is negative")
        if gate_lr is not None and gate_lr <= 0:
            raise UserError(f"adapter.method.gate_lr: {gate_lr} is not positive")
        if xi_scale not in ("const", "lr"):
            raise UserError(f"adapter.method.xi_scale: {xi_scale!r} is not one of const, lr")
        if l1 < 0:
            raise UserError(f"adapter.method.l1: {l1} is negative")
        if phases < 1:
            raise UserError(f"adapter.method.phases: {phases} is not positive")
        if spacing not in ("linear", "log_linear", "exp_linear"):
            raise UserError(f"adapter.method.spacing: {spacing!r} is not one of linear, log_linear, exp_linear")
        if phases > 1 and not 0 <= xi_min <= xi:
            raise UserError(f"adapter.method.xi_min: {xi_min} is not in [0, xi = {xi}]")
        if phases > 1 and spacing == "exp_linear" and xi_min == 0:
            raise UserError("adapter.method.xi_min: spacing exp_linear needs a positive one")
        if not 0 < first_phase < 1:
            raise UserError(f"adapter.method.first_phase: {first_phase} is not in (0, 1)")
        self.rank, self.alpha, self.dropout = rank, alpha, require_dropout(dropout)
        self.xi, self.gate_lr, self.xi_scale, self.prox, self.l1 = xi, gate_lr, xi_scale, require_prox(prox), l1
        self.phases, self.xi_min, self.spacing, self.first_phase = phases, xi_min, spacing, first_phase
        self.scale = scale_of(alpha, rank, "rank")

    def adapter(self, site: Site, shared: nn.Module | None) -> SoRAAdapter:
        return SoRAAdapter(site, self)

    def allocate(self, adapters: Mapping[str, SoRAAdapter], shared: nn.Module | None) -> None:
        for adapter in adapters.values():
            adapter.gates_in_all = self.rank * len(adapters)

    def coordinate(self, adapters: Mapping[str, SoRAAdapter], shared: nn.Module | None, clock: Clock) -> None:
        threshold = self.threshold(clock.step, clock.total)
        group = clock.group(next(iter(adapters.values())).gate) if self.xi_scale == "lr" else {"lr": 1.0}
        if clock.step == 1 and self.xi:
            self._warn_if_nothing_can_die(group.get("initial_lr", group["lr"]), clock.total)
        for adapter in adapters.values():
            adapter.shrink(threshold * group["lr"], self.prox)

    def threshold(self, step: int, total: int) -> float:
        """xi after optimizer step number `step` (1 to total), before xi_scale."""
        if self.phases == 1:
            return self.xi
        late = (step - 1 - self.first_phase * total) / ((1 - self.first_phase) * total)  # share of the later phases that is over
        part = min(math.floor(late * (self.phases - 1)) + 1, self.phases - 1) if late >= 0 else 0
        even = part / (self.phases - 1)
        if self.spacing == "exp_linear":
            return self.xi_min ** (1 - even) * self.xi**even
        if self.spacing == "log_linear":
            return math.log((1 - even) * math.exp(self.xi_min) + even * math.exp(self.xi))
        return (1 - even) * self.xi_min + even * self.xi

    def param_groups(self, adapters: Mapping[str, SoRAAdapter], shared: nn.Module | None, lr: float) -> list[dict[str, Any]]:
        return gates_apart(adapters, self.gate_lr)

    def count(self, site: Site) -> int:
        return self.rank * (sum(site.matrix_shape) + 1)

    def _warn_if_nothing_can_die(self, rate: float, total: int) -> None:
        shrink = rate * sum(self.threshold(step, total) for step in range(1, total + 1))
        if shrink < 0.1:
            warnings.warn(f"SoRA: {total} steps shrink a gate by {shrink:.1e} at most, so next to no rank will die: raise xi", stacklevel=2)
