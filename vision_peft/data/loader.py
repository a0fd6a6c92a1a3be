"""A training loader that goes on where a checkpoint left it, to the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from vision_peft.data.sampler import ResumableSampler
from vision_peft.errors import UserError


class ResumableLoader(DataLoader):
    """A DataLoader over a ResumableSampler whose position in the epoch is part of the checkpoint.

    Lightning finds `state_dict` and `load_state_dict` and calls them: the state says how many batches of which epoch have been handed
    out. A run resumed inside an epoch is given the rest of that epoch; with a loader without state it would be given the epoch's
    beginning again.

    The iterator does nothing before its first batch is asked for. Lightning creates it before it calls the sampler's `set_epoch`,
    and workers, which would ask for indices at once, would get those of another epoch.
    """

    _handed_out = 0  # batches of the running epoch
    _resume_at = (-1, 0)  # (epoch, batches) of a checkpoint, until an iteration begins

    def __iter__(self) -> Iterator[Any]:
        (epoch, batches), self._resume_at = self._resume_at, (-1, 0)
        sampler = self.sampler
        # With trainer.overfit_batches Lightning replaces the sampler by a sequential one, for which there is nothing to resume.
        resumable = isinstance(sampler, ResumableSampler)
        self._handed_out = batches if resumable and sampler.epoch == epoch else 0
        if resumable:
            sampler.start_at(self._handed_out * self.batch_size)
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the loader is, and what it counts in: a place in an order makes sense for that very order only."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": self._handed_out, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration where `state` was taken, if it is of the same epoch.

        Raises:
            UserError: the checkpoint counts in other batches (another seed, number of pictures or global batch size).
        """
        for key, here in self._identity().items():
            if state[key] != here:
                raise UserError(f"checkpoint: it stopped inside an epoch with {key} {state[key]}, but this run has {here}")
        self._resume_at = (state["epoch"], state["batches"])

    def _identity(self) -> dict[str, int]:
        ranks = getattr(self.sampler, "num_replicas", 1)
        return {
            "seed": getattr(self.sampler, "seed", 0),
            "pictures": len(self.dataset),
            "global_batch_size": self.batch_size * ranks,
        }
