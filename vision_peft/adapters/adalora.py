"""AdaLoRA: the update has the form of an SVD, and a global budget of triplets goes to the weights where they matter most.

    W' = W + (alpha / r_0) B diag(e) A,    A (r_0, n), e (r_0,), B (m, r_0)
    loss + orthogonality * mean over all A and B of |A A^T - I|_F and |B^T B - I|_F

Start: A, B ~ N(0, 0.02^2), e = 0, so W' = W. Trained: r_0 (m + n) + r_0 numbers a weight. A triplet is one row of A, its entry of e and
its column of B; its score is that of the entry plus the mean scores of the row and of the column (scores: `_importance.py`).
The budget is r_0 L triplets for L weights at first, falls with a cube, and stays at r L for the last part of the run. Every
`interval` steps e is set to zero outside the triplets with the highest scores of all weights together; they keep their gradient and
may come back, until the last part begins and its mask holds. Nothing is resized while training; an export leaves out what is zero.

The weight of the penalty and the divisor r_0, which stays when triplets go, are those of the programs. Warm-up and last part are given
as shares of the run; the paper's are steps, which come to 0.1 and 0.5 of the runs on its smaller tasks. Nothing is pruned before step
`interval`: averages of a step or two say nothing, and a run that is shorter keeps all triplets.

Source: Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023; checked against the
layer and the allocator of huggingface/peft.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vision_peft.adapters._importance import Sensitivity, cubic_budget, keep_highest, require_beta
from vision_peft.adapters._low_rank import require_dropout, require_rank
from vision_peft.engine.adapter import Clock, Evidence, Factored, FactoredAdapter, Method, Shared
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class AdaLoRAAdapter(FactoredAdapter):
    kept: Tensor  # (r_0,) of the latest allocation

    def __init__(self, site: Site, method: AdaLoRA) -> None:
        super().__init__()
        rank, (out, columns) = method.start_rank, require_rank(site, method.start_rank)
        self.scale, self.dropout = method.alpha / rank, method.dropout
        self.penalty_weight = 0.0  # set in allocate(): its mean runs over all weights
        self.A = nn.Parameter(torch.zeros(rank, columns))
        self.e = nn.Parameter(torch.zeros(rank))
        self.B = nn.Parameter(torch.zeros(out, rank))
        self.sensitivity = nn.ModuleDict({name: Sensitivity(p.shape, method.beta1, method.beta2) for name, p in self.named_parameters()})
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        for factor in (self.A, self.B):
            factor.copy_(0.02 * torch.randn(factor.shape, generator=evidence.generator, dtype=torch.float32))
        self.e.zero_()

    def factored(self, W: Tensor) -> Factored:
        return Factored(self.B * (self.scale * self.e), self.A, None, self.dropout)

    def penalty(self) -> Tensor | float:
        if self.penalty_weight == 0:
            return 0.0
        unit = torch.eye(len(self.e), dtype=self.A.dtype, device=self.A.device)
        return self.penalty_weight * ((self.A @ self.A.mT - unit).norm() + (self.B.mT @ self.B - unit).norm())

    def scores(self) -> Tensor:
        """(r_0,) of the triplets."""
        of = {name: sensitivity.score() for name, sensitivity in self.sensitivity.items()}
        return of["e"] + of["A"].mean(1) + of["B"].mean(0)

    def compact(self) -> AdaLoRAAdapter:
        small, alive = copy.deepcopy(self), self.e != 0
        small.A, small.e, small.B = (nn.Parameter(each.detach()) for each in (self.A[alive], self.e[alive], self.B[:, alive]))
        return small


class AdaLoRA(Method):
    """Adaptive budget allocation.

    Args:
        rank: r, triplets a weight at the end, on average.
        initial_rank: r_0, triplets every weight starts with; null for one and a half times r.
        alpha: numerator of the scale alpha / r_0.
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
        warmup: share of the run before the budget begins to fall.
        final: share of the run, at its end, with the mask fixed.
        interval: optimizer steps between two allocations.
        beta1, beta2: decay of the averages of importance and of its deviation.
        orthogonality: weight of the penalty.
    """

    low_rank = True
    kind = "low-rank"
    formula = "r_0 (m + n) + r_0"
    advice = "a fixed budget of ranks should find the layers that need them, and runs take hundreds of steps."

    def __init__(
        self,
        rank: int = 8,
        initial_rank: int | None = None,
        alpha: float = 8.0,
        dropout: float = 0.0,
        warmup: float = 0.1,
        final: float = 0.5,
        interval: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonality: float = 0.5,
    ) -> None:
        if rank < 1:
            raise UserError(f"adapter.method.rank: {rank} is not positive")
        if initial_rank is not None and initial_rank < rank:
            raise UserError(f"adapter.method.initial_rank: {initial_rank} is below rank, {rank}")
        if warmup < 0:
            raise UserError(f"adapter.method.warmup: {warmup} is negative")
        if final < 0 or warmup + final >= 1:
            raise UserError(f"adapter.method.final: {final} and warmup, {warmup}, leave no part of the run for the budget to fall")
        if interval < 1:
            raise UserError(f"adapter.method.interval: {interval} is not positive")
        if orthogonality < 0:
            raise UserError(f"adapter.method.orthogonality: {orthogonality} is negative")
        self.rank, self.initial_rank, self.alpha, self.dropout = rank, initial_rank, alpha, require_dropout(dropout)
        self.warmup, self.final, self.interval, self.orthogonality = warmup, final, interval, orthogonality
        self.beta1, self.beta2 = require_beta("beta1", beta1), require_beta("beta2", beta2)
        self.start_rank = -(-3 * rank // 2) if initial_rank is None else initial_rank

    def adapter(self, site: Site, shared: Shared | None) -> AdaLoRAAdapter:
        return AdaLoRAAdapter(site, self)

    def count(self, site: Site) -> int:
        return self.start_rank * (sum(site.matrix_shape) + 1)

    def allocate(self, adapters: Mapping[str, AdaLoRAAdapter], shared: Shared | None) -> None:
        for adapter in adapters.values():
            adapter.penalty_weight = self.orthogonality / (2 * len(adapters))

    def coordinate(self, adapters: Mapping[str, AdaLoRAAdapter], shared: Shared | None, clock: Clock) -> None:
        members = list(adapters.values())
        warmup, final = int(self.warmup * clock.total), int(self.final * clock.total)
        fixed = max(clock.total - final, self.interval)  # the mask holds from here on
        target = self.rank * len(members)
        if clock.step < fixed:
            for adapter in members:
                for name, sensitivity in adapter.sensitivity.items():
                    sensitivity.update(adapter.get_parameter(name))
        falls = warmup < clock.step < fixed
        # the second reason: a run resumed with another length may never see the very step
        ends = clock.step >= fixed and (clock.step == fixed or sum(int(each.kept.sum()) for each in members) != target)
        if ends or (falls and clock.step % self.interval == 0):
            budget = target if ends else cubic_budget(clock.step, clock.total, self.start_rank * len(members), target, warmup, final)
            for adapter, kept in zip(members, keep_highest([each.scores() for each in members], int(budget))):
                adapter.kept.copy_(kept)
                adapter.e.mul_(kept)
        elif clock.step > fixed:
            for adapter in members:
                adapter.e.mul_(adapter.kept)
