"""Which picture comes when: a function of (seed, epoch) alone, the same for one process and for many."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from typing import NamedTuple

import torch
from torch.utils.data import DistributedSampler


class Draw(NamedTuple):
    """One picture of one epoch: all that its random augmentation may depend on, besides the run's seed."""

    index: int
    epoch: int


class ResumableSampler(DistributedSampler):
    """Every picture once an epoch, in an order drawn from (seed, epoch); can begin in the middle of an epoch.

    Rank r of n takes places r, r + n, r + 2n, ... of one order. With batches of b a rank, the n batches of a step together are
    therefore the batch that a single process with batches of n * b would have had. When n does not divide the number of pictures the
    first ones of the order are repeated at its end, because ranks with fewer batches would leave the others waiting.

    It is a DistributedSampler in type so that Lightning, which calls `set_epoch`, does not wrap it in one of its own.

    Args:
        data: anything with a length; items are never looked at.
        seed: of the order.
        rank, world_size: this process among all; given, so that no process group is needed.
    """

    def __init__(self, data: Sized, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=True, seed=seed, drop_last=False)
        self._start = 0

    def start_at(self, place: int) -> None:
        """The next iteration, and only that, leaves out the first `place` pictures of this rank. The length stays a whole epoch's."""
        self._start = place

    def __iter__(self) -> Iterator[Draw]:
        start, self._start = self._start, 0
        mine = self.order()[self.rank :: self.num_replicas]
        return iter([Draw(index, self.epoch) for index in mine[start:]])

    def order(self) -> list[int]:
        """The epoch's order over all ranks, repeats included (total_size,)."""
        # Hashed into one number, because seed + epoch would give seed 2 the orders of seed 1 one epoch later, and because torch's
        # generator uses only the low 32 bits of its seed.
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self.epoch}").getrandbits(32))
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        while len(order) < self.total_size:
            order += order[: self.total_size - len(order)]
        return order


class OrderedSampler(DistributedSampler):
    """For evaluation: rank r of n takes pictures r, r + n, ...; none is repeated, so that a metric counts each once.

    (Lightning's own choice repeats pictures to make the ranks equal, which shifts accuracy a little.)
    """

    def __init__(self, data: Sized, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))
