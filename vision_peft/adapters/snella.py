"""SNELLA: SNELL with a mixed kernel, whose non-zero entries also compete across weights while training.

    D_ij = 0.1 |p_i - q_j| - 0.1 |p'_i - q'_j|        (P_out, P_in as in SNELL)
    K = D + alpha softmax(D / gamma, over the outputs) + beta
    dW = K |K| where |K| > the s_l-quantile of |K|, else 0,  |K| as a factor held constant;    W' = W + dW

alpha = 1, beta = 0, gamma = 1 at the start, trained, one each a weight. Trained: r (m + n) + 3 numbers a weight. The softmax of an
input's column sums to 1, so K starts near 1/m and dW near 1/m^2: small, not zero. The quadratic form holds at s_l = 0 too.

Across weights: v_l entries of weight l survive, s_l = 1 - v_l / (m n). Their sum N falls with a cube, tick by tick, from that of
`initial_sparsity` to that of `sparsity`, and is divided in proportion to the scores of the weights: mean importance of P_out plus mean
importance of P_in (`_importance.py`), up to a weight's size. Means, so weights of equal score keep equal numbers of entries and small
weights end up denser than large ones. A weight left with nothing has no gradient any more and hardly returns.

A tick is an epoch, as in the scripts, or an optimizer step. The division for epoch e happens after the first step of epoch e, because
the number of epochs follows from the length of the one before. Volumes are whole numbers with the exact sum (the program truncates,
and may lose up to one a weight); |gamma| counts as at least 1e-3 with its gradient intact (the program may divide by zero). The
program's moving average of weights and its two other scores are left out.

Source: "Kernelized Sparse Fine-Tuning with Bi-level Parameter Competition for Vision Models", 2025; read from the code
(ssfgunner/SNELL) and the abstract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._importance import Sensitivity, cubic_budget, divide, require_beta
from vision_peft.adapters._kernel import distance_kernel, order_statistic, recomputed_linear, start_points_
from vision_peft.engine.adapter import Adapter, Clock, Evidence, Method, Shared
from vision_peft.engine.site import Site
from vision_peft.errors import UserError

Tick = Literal["epoch", "step"]


class Schedule(Shared):
    """Where the division across weights stands."""

    tick: Tensor  # () the latest epoch or step that was looked at
    steps_an_epoch: Tensor  # () 0 until known

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tick", torch.tensor(0))
        self.register_buffer("steps_an_epoch", torch.tensor(0))

    def now(self, unit: Tick, clock: Clock) -> tuple[int, int]:
        """(present tick, ticks of the run). The length of an epoch is known once the second one has begun."""
        if unit == "step":
            return clock.step, clock.total
        if clock.epoch > 0 and self.steps_an_epoch == 0:
            self.steps_an_epoch.fill_(max(1, (clock.step - 1) // clock.epoch))
        length = int(self.steps_an_epoch)
        return clock.epoch, -(-clock.total // length) if length else clock.epoch + 1


class SNELLAAdapter(Adapter):
    volume: Tensor  # () entries that survive

    def __init__(self, site: Site, method: SNELLA) -> None:
        super().__init__()
        out, columns = site.matrix_shape
        self.size = out * columns
        self.P_out = nn.Parameter(torch.zeros(2, out, method.rank // 2))
        self.P_in = nn.Parameter(torch.zeros(2, columns, method.rank // 2))
        self.alpha, self.beta, self.gamma = (nn.Parameter(torch.zeros(())) for _ in range(3))
        self.sensitivity = nn.ModuleDict(
            {name: Sensitivity(self.get_parameter(name).shape, method.beta1, method.beta2) for name in ("P_out", "P_in")}
        )
        self.register_buffer("volume", torch.tensor(round((1 - method.initial_sparsity) * self.size)))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        start_points_(self.P_in, evidence.generator)
        start_points_(self.P_out, evidence.generator)
        self.alpha.fill_(1.0)
        self.beta.zero_()
        self.gamma.fill_(1.0)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta(*self._tensors(), threshold=[])

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return recomputed_linear(x, W, b, partial(self.delta, threshold=[]), *self._tensors())

    def delta(self, P_out: Tensor, P_in: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, threshold: list[Tensor]) -> Tensor:
        """dW (m, n). Puts the threshold into the empty list, where the backward pass finds it."""
        D = distance_kernel(P_out, P_in, P_out.new_tensor([0.1, -0.1]))
        apart = gamma + (torch.where(gamma < 0, gamma.clamp(max=-1e-3), gamma.clamp(min=1e-3)) - gamma).detach()
        K = D + alpha * torch.softmax(D / apart, dim=0) + beta
        size = K.detach().abs()
        if not threshold:
            # position s_l (N - 1) of the ascending magnitudes, in an order of operations that is exact at both ends
            threshold.append(order_statistic(size, (self.size - 1) - int(self.volume) * (self.size - 1) / self.size))
        return K * (size * (size > threshold[0]))

    def score(self) -> Tensor:
        """How much the weight matters, beside the others."""
        return sum(each.score().mean(dtype=torch.float64) for each in self.sensitivity.values())

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.P_out, self.P_in, self.alpha, self.beta, self.gamma


class SNELLA(Method):
    """Kernelised sparse update with a budget across weights.

    Args:
        rank: r, even: coordinates of a point, half of them in each distance.
        sparsity: share of all entries of all updates that is zero at the end, in [0, 1); chosen per task (0.3 is CUB-200's).
        initial_sparsity: the same at the start.
        tick: what the schedule counts, `epoch` or `step`; the three arguments below are in ticks.
        warmup: ticks before the budget falls.
        final: ticks at the end with the final budget.
        interval: ticks between two divisions.
        beta1, beta2: decay of the averages of importance and of its deviation.
    """

    kind = "sparse"
    formula = "r (m + n) + 3"
    advice = "as SNELL, with the sparsity budget moving between layers while training."
    identity_at_init = False

    def __init__(
        self,
        rank: int = 32,
        sparsity: float = 0.3,
        initial_sparsity: float = 0.0,
        tick: Tick = "epoch",
        warmup: int = 0,
        final: int = 0,
        interval: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        if rank < 2 or rank % 2:
            raise UserError(f"adapter.method.rank: {rank} is not a positive even number")
        if not 0 <= sparsity < 1:
            raise UserError(f"adapter.method.sparsity: {sparsity} is not in [0, 1)")
        if not 0 <= initial_sparsity <= sparsity:
            raise UserError(f"adapter.method.initial_sparsity: {initial_sparsity} is not between 0 and sparsity, {sparsity}")
        if tick not in ("epoch", "step"):
            raise UserError(f"adapter.method.tick: {tick!r} is not one of epoch, step")
        for key, value, least in (("warmup", warmup, 0), ("final", final, 0), ("interval", interval, 1)):
            if value < least:
                raise UserError(f"adapter.method.{key}: {value} is below {least}")
        self.rank, self.sparsity, self.initial_sparsity, self.tick = rank, sparsity, initial_sparsity, tick
        self.warmup, self.final, self.interval = warmup, final, interval
        self.beta1, self.beta2 = require_beta("beta1", beta1), require_beta("beta2", beta2)

    def adapter(self, site: Site, shared: Shared | None) -> SNELLAAdapter:
        return SNELLAAdapter(site, self)

    def count(self, site: Site) -> int:
        return self.rank * sum(site.matrix_shape) + 3

    def shared(self, sites: Sequence[Site]) -> Schedule:
        return Schedule()

    def coordinate(self, adapters: Mapping[str, SNELLAAdapter], shared: Schedule, clock: Clock) -> None:
        members = list(adapters.values())
        for adapter in members:
            for name, sensitivity in adapter.sensitivity.items():
                sensitivity.update(adapter.get_parameter(name))
        now, total = shared.now(self.tick, clock)
        if now <= int(shared.tick):
            return
        shared.tick.fill_(now)
        if now > self.warmup and (now > total - self.final or now % self.interval == 0):
            self._divide(members, now, total)

    def _divide(self, members: list[SNELLAAdapter], now: int, total: int) -> None:
        """Give every weight its number of surviving entries for tick `now` of `total`."""
        sizes = torch.tensor([each.size for each in members])
        first, last = ((1 - share) * int(sizes.sum()) for share in (self.initial_sparsity, self.sparsity))
        budget = cubic_budget(now, total, first, last, self.warmup, self.final)
        for adapter, volume in zip(members, divide(budget, torch.stack([each.score() for each in members]), sizes)):
            adapter.volume.copy_(volume)
