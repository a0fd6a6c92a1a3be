"""ReLoRA: LoRA that is folded into the weight every so often and starts afresh, so that the changes add up to a high rank.

    W' = W + D + s B A,    A (r, n), B (m, r), D (m, n)
    every T optimizer steps:  D <- D + s B A,  A drawn anew,  B <- 0,  the optimizer's moments of A and B pruned

A restart leaves W' as it is. D is a buffer, not trained, so the pretrained weight is never rewritten; after k restarts its rank is up to
k r, and it is saved with the adapter, which is then as large as the weights it acts on. Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = D = 0,
so W' = W. Trained: r (m + n) numbers a weight. The draws of a restart follow from a stored seed and the number of restarts, so a resumed
run goes on as an unbroken one. There is no dropout: the branch is dense.

Pruning sets the same entries of all moments of a parameter to zero: those with the smallest first moment, or random ones. The authors
prune each moment by itself and warm the learning rate up again after a restart. Here the schedule is the task's, so there is no second
warm-up, and a first moment kept without its second would make a step of many times the learning rate.

Source: Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", ICLR 2024; read in the code (Guitaricet/relora and
hhnqqq/MyTransformers). The default T is meant for runs of tens of thousands of steps; the default alpha is LoRA's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._lora_like import LoRALike
from vision_peft.adapters._low_rank import LowRankAdapter, Scaling
from vision_peft.engine.adapter import Adapter, Clock, Evidence, Shared
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_

Pruning = Literal["magnitude", "random"]


class ReLoRAAdapter(LowRankAdapter):
    D: Tensor  # (m, n)
    seed: Tensor  # (), of the restarts
    restarts: Tensor  # ()

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, scale, 0.0)
        self.register_buffer("D", torch.zeros(site.matrix_shape))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        super().initialize(W, evidence)
        self.seed.copy_(torch.randint(2**48, (), generator=evidence.generator))

    def weight(self, W: Tensor) -> Tensor:
        return torch.addmm(W + self.D, self.scale * self.B, self.A)

    def factored(self, W: Tensor) -> None:
        return None  # D is dense

    def restart(self) -> torch.Generator:
        """Fold the factors into D and draw new ones; what is drawn next from the generator belongs to this restart too."""
        self.D.addmm_(self.B, self.A, alpha=self.scale)
        self.restarts += 1
        generator = torch.Generator().manual_seed(int(self.seed) + int(self.restarts))
        kaiming_rows_(self.A, generator)
        self.B.zero_()
        return generator


class ReLoRA(LoRALike):
    """LoRA with restarts.

    Args:
        rank: r, 1 to min(m, n).
        alpha, scaling: as LoRA.
        every: T, optimizer steps from one restart to the next; there is none after the last step.
        prune: share of the optimizer's moments of A and B that a restart sets to zero, 0 to 1.
        pruning: which: `magnitude` for the smallest, `random`.
    """

    advice = "long training, where a sum of many low-rank updates should reach high rank."
    low_rank = False
    steps_to_train = 3  # so that the contract sees a restart after the second step and a step after it
    tiny = {"every": 2}

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 8.0,
        scaling: Scaling = "rank",
        every: int = 5000,
        prune: float = 0.999,
        pruning: Pruning = "magnitude",
    ) -> None:
        if every < 1:
            raise UserError(f"adapter.method.every: {every} is not positive")
        if not 0 <= prune <= 1:
            raise UserError(f"adapter.method.prune: {prune} is not in [0, 1]")
        if pruning not in ("magnitude", "random"):
            raise UserError(f"adapter.method.pruning: {pruning!r} is not one of magnitude, random")
        super().__init__(rank, alpha, scaling)
        self.every, self.prune, self.pruning = every, prune, pruning

    def adapter(self, site: Site, shared: nn.Module | None) -> ReLoRAAdapter:
        return ReLoRAAdapter(site, self.rank, self.scale)

    def coordinate(self, adapters: Mapping[str, Adapter], shared: Shared | None, clock: Clock) -> None:
        if clock.step % self.every or clock.step >= clock.total:
            return
        for adapter in adapters.values():
            generator = adapter.restart()
            for parameter in (adapter.A, adapter.B):
                if clock.optimizer is not None and parameter in clock.optimizer.state:
                    self._prune(parameter, clock.optimizer.state[parameter].values(), generator)

    def _prune(self, parameter: Tensor, state: Iterable[Any], generator: torch.Generator) -> None:
        moments = [each for each in state if isinstance(each, Tensor) and each.shape == parameter.shape]  # the first moment is first
        if not moments:
            return
        order = moments[0].abs() if self.pruning == "magnitude" else torch.rand(parameter.shape, generator=generator)
        dropped = order.flatten().topk(round(self.prune * order.numel()), largest=False).indices.to(parameter.device)
        for moment in moments:
            moment.view(-1)[dropped] = 0
