"""What the data modules of pictures share: loaders that resume, draw nothing from the global stream, and divide a set among processes."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import lightning.pytorch as pl
import torch

from vision_peft.data.loader import ResumableLoader
from vision_peft.data.sampler import ResumableSampler


class PictureData(pl.LightningDataModule):
    """Attributes:
        seed: of order and draws.
        batch_size: of training, a device and step.
        num_workers: processes of a loader.
    """

    seed: int
    batch_size: int
    num_workers: int = 0

    def _training_loader(self, dataset: Sized) -> ResumableLoader:
        sampler = ResumableSampler(dataset, self.seed, *self._place())
        return ResumableLoader(dataset, batch_size=self.batch_size, sampler=sampler, **self._loading())

    def _loading(self) -> dict[str, Any]:
        """Options of every loader."""
        # A generator of its own: without one a loader draws its workers' base seed from the global stream at every epoch.
        own = torch.Generator().manual_seed(self.seed)
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return {**workers, "pin_memory": torch.cuda.is_available(), "generator": own}

    def _place(self) -> tuple[int, int]:
        """(rank, world size) of this process."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
