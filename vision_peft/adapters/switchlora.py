"""SwitchLoRA: LoRA whose rows and columns are exchanged for others, a few at a time, so that the sum of all changes has any rank.

    W' = W + O + s B A,    s = alpha / r

A (r, n), B (m, r) trained; O (m, n) a buffer that makes up for every exchange, so that W' never jumps. There are c = min(m, n) candidate
rows for A and as many columns for B, buffers too, of which r each are loaded. Start: all candidates uniform with standard deviations
    std_A = (sqrt(m) r / (3 n^1.5))^(1/4),    std_B = (r / (3 sqrt(m n)))^(1/4),
the last r loaded, O = -s B A, so W' = W with both factors non-zero. Trained: r (m + n) numbers a weight.

Exchange of row i of A for candidate d, after an optimizer step:
    O += s B[:, i] (A[i] - C_A[d]);    A[i] goes back to its slot, C_A[d] is loaded;    column i of B is frozen for `freeze` steps
and likewise for columns of B, which freeze rows of A. The frozen counterpart's moments in the optimizer are set to zero, and so is the
count of steps in its bias correction, since its gradients depended on what has gone; what is loaded inherits the moments of its place,
whose gradient does not depend on it. Slots are taken in a cycle: the next candidate is the one after the one before. After step t of T,
r / interval(t) vectors of each factor are exchanged, rounded at random, interval(t) = interval / 0.3^((t + 1) / (decay T)); fewer where
the rows of A, the columns of B and what is still frozen would meet, none where c = r.

Exchanges lie between two optimizer steps; the program has one more, before the first. Its count of steps for each vector is had from
a plain Adam by scaling the moments before a step and back after it; exact as long as gradients are not clipped in between. Other
optimizers keep their state. Weight decay would move frozen vectors, so there is none. Candidates and O are saved, and make the
adapter larger than the weights. Slots chosen at random, an option of the program that changes the weight, are left out.

Source: Zhou et al., "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information", arXiv 2406.06564
(code: asfsdsf/SwitchLoRA).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_rank, scale_of
from vision_peft.engine.adapter import Adapter, Clock, Evidence, Method, Shared, trainable
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class SwitchLoRAAdapter(Adapter):
    offset: Tensor  # (m, n) O
    seed: Tensor  # () of the draws that round the number of exchanges
    turn: Tensor  # (2,) the row of A and the column of B that are exchanged next

    def __init__(self, site: Site, method: SwitchLoRA) -> None:
        super().__init__()
        rank, (out, columns) = method.rank, require_rank(site, method.rank)
        self.scale, self.rank, self.candidates = method.scale, rank, min(out, columns)
        self.A = nn.Parameter(torch.zeros(rank, columns))
        self.B = nn.Parameter(torch.zeros(out, rank))
        self.register_buffer("offset", torch.zeros(out, columns))
        self.register_buffer("seed", torch.tensor(0))
        self.register_buffer("turn", torch.tensor([0, rank // 2]))
        self.sides = nn.ModuleDict({"A": Side(rank, self.candidates, columns), "B": Side(rank, self.candidates, out)})

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        (m, n), r, c = W.shape, self.rank, self.candidates
        for side, fourth in (("A", math.sqrt(m) * r / n**1.5), ("B", r / math.sqrt(m * n))):
            pool = self.sides[side].pool
            bound = math.sqrt(3) * (fourth / 3) ** 0.25
            pool.copy_(bound * (2 * torch.rand(pool.shape, generator=evidence.generator, dtype=torch.float32) - 1))
        order = torch.arange(r)
        for side, slots in (("A", order), ("B", (order - r // 2) % r)):
            self.sides[side].slot.copy_(c - r + slots)
            self.vectors(side).copy_(self.sides[side].pool[self.sides[side].slot])
        self.offset.copy_(-self.scale * self.B @ self.A)
        self.seed.copy_(torch.randint(2**62, (), generator=evidence.generator))

    def weight(self, W: Tensor) -> Tensor:
        return W + (self.offset + self.scale * self.B @ self.A)

    def vectors(self, side: str) -> Tensor:
        """The r rows of A or columns of B, as rows; a view that can be written to."""
        return self.A if side == "A" else self.B.mT

    def switch(self, wanted: float, freeze: int, step: int) -> Tensor:
        """Exchange `wanted` vectors of each factor, rounded at random. Returns 2 rows of indices: of A, then of B, all new."""
        draw = torch.rand((), generator=torch.Generator().manual_seed(int(self.seed) + step))  # the same when the run is resumed
        number = int(wanted) + int(draw < wanted - int(wanted))
        row, column = self.turn.tolist()
        frozen = {side: int((held.frozen > 0).sum()) for side, held in self.sides.items()}
        apart = (row - frozen["A"] - column) % self.rank, (column - frozen["B"] - row) % self.rank
        number = min(number, *apart, self.candidates - self.rank)
        steps = torch.arange(number, device=self.A.device)
        places = torch.stack([(row + steps) % self.rank, (column + steps) % self.rank])
        if number:
            for side, mine in zip("AB", places):
                self._exchange(side, mine, freeze)
        self.turn.add_(number).remainder_(self.rank)
        return places

    def _exchange(self, side: str, mine: Tensor, freeze: int) -> None:
        """The loaded vectors at the places `mine` for the next candidates; W' stays."""
        own, other = self.vectors(side), self.vectors("B" if side == "A" else "A")
        held, counterpart = self.sides[side], self.sides["B" if side == "A" else "A"]
        new = (held.slot[mine[:1] - 1] + 1 + torch.arange(len(mine), device=mine.device)) % self.candidates
        loaded = held.pool[new]
        change = own[mine] - loaded
        self.offset.add_(self.scale * (other[mine].mT @ change if side == "A" else change.mT @ other[mine]))
        held.pool[held.slot[mine]] = own[mine]
        own[mine] = loaded
        held.slot[mine] = new
        counterpart.frozen[mine] = freeze
        counterpart.steps[mine] = 0


class Side(nn.Module):
    """What is known of the vectors of one factor."""

    pool: Tensor  # (c, width) candidates; those that are loaded are stale here
    slot: Tensor  # (r,) the candidate that each vector came from
    frozen: Tensor  # (r,) steps for which it stays frozen
    steps: Tensor  # (r,) optimizer steps since its moments were zero

    def __init__(self, rank: int, candidates: int, width: int) -> None:
        super().__init__()
        self.register_buffer("pool", torch.zeros(candidates, width))
        for name in ("slot", "frozen", "steps"):
            self.register_buffer(name, torch.zeros(rank, dtype=torch.int64))


class SwitchLoRA(Method):
    """LoRA with exchanged vectors.

    Args:
        rank: r, 1 to min(m, n); vectors are exchanged where it is below min(m, n).
        alpha: numerator of the scale alpha / r. The paper has 1, and learning rates far above LoRA's.
        interval: steps in which all r vectors of a factor are exchanged once, at the start; at least 2 `freeze`.
        decay: share of the run after which exchanges are 0.3 times as frequent.
        freeze: steps for which the counterpart of an exchanged vector stays frozen.
    """

    kind = "low-rank"
    formula = "r (m + n)"
    advice = "pre-training from scratch at LoRA's memory: factors are exchanged as training goes."

    def __init__(self, rank: int = 8, alpha: float = 1.0, interval: float = 40.0, decay: float = 0.1, freeze: int = 5) -> None:
        if freeze < 0:
            raise UserError(f"adapter.method.freeze: {freeze} is negative")
        if interval < max(1, 2 * freeze):
            raise UserError(f"adapter.method.interval: {interval} is below {max(1, 2 * freeze)}, twice freeze")
        if decay <= 0:
            raise UserError(f"adapter.method.decay: {decay} is not positive")
        self.rank, self.alpha, self.interval, self.decay, self.freeze = rank, alpha, interval, decay, freeze
        self.scale = scale_of(alpha, rank, "rank")

    def adapter(self, site: Site, shared: Shared | None) -> SwitchLoRAAdapter:
        return SwitchLoRAAdapter(site, self)

    def count(self, site: Site) -> int:
        return self.rank * sum(site.matrix_shape)

    def param_groups(self, adapters: Mapping[str, Adapter], shared: Shared | None, lr: float) -> list[dict[str, Any]]:
        return [{"params": trainable(adapters.values()), "name": "adapter", "weight_decay": 0.0}]

    def adjust_gradients(self, adapters: Mapping[str, SwitchLoRAAdapter], shared: Shared | None, clock: Clock) -> None:
        for adapter in adapters.values():
            for side, held in adapter.sides.items():
                parameter = adapter.get_parameter(side)
                if parameter.grad is not None:
                    gradient = parameter.grad if side == "A" else parameter.grad.mT
                    gradient.masked_fill_((held.frozen > 0)[:, None], 0.0)
                held.steps.add_(1)
                for moment, beta, power, factor in _corrections(parameter, side, held.steps, clock, done=0):
                    # after the step it holds `factor` times the vector's own moment, for which the common count is the right one
                    moment.mul_(factor).add_(gradient.pow(power) * ((1 - beta) / beta * (factor - 1)))

    def coordinate(self, adapters: Mapping[str, SwitchLoRAAdapter], shared: Shared | None, clock: Clock) -> None:
        rate = max(0.3 ** ((clock.step + 1) / (self.decay * clock.total)), 1e-8)
        for adapter in adapters.values():
            for side, held in adapter.sides.items():
                for moment, _, _, factor in _corrections(adapter.get_parameter(side), side, held.steps, clock, done=1):
                    moment.div_(factor)
                held.frozen.sub_(1).clamp_(min=0)
            places = adapter.switch(self.rank * rate / self.interval, self.freeze, clock.step)
            for side, reset in zip("BA", places):  # of each factor, the counterparts of what was exchanged in the other
                for moment, *_ in _corrections(adapter.get_parameter(side), side, adapter.sides[side].steps, clock, done=1):
                    moment[reset] = 0.0


def _corrections(parameter: nn.Parameter, side: str, steps: Tensor, clock: Clock, done: int) -> list[tuple[Tensor, float, int, Tensor]]:
    """(moment with vectors as rows, beta, power of the gradient it averages, factor (r, 1)) for both moments of an Adam.

    The factor is what the moment must be scaled by so that dividing by 1 - beta^t, t the optimizer's count at this step, amounts to
    dividing by 1 - beta^k, k the vector's own. Empty before the first step, where they agree, and for other optimizers.
    """
    state = {} if clock.optimizer is None else clock.optimizer.state.get(parameter, {})
    if "exp_avg_sq" not in state:
        return []
    count = int(state["step"]) + 1 - done
    found = []
    for (name, power), beta in zip((("exp_avg", 1), ("exp_avg_sq", 2)), clock.group(parameter)["betas"]):
        own = 1 - beta ** steps.double()
        factor = ((1 - beta**count) / own).clamp(min=1.0).to(parameter.dtype)[:, None]
        found.append((state[name] if side == "A" else state[name].mT, beta, power, factor))
    return found
