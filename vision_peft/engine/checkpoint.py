"""Checkpoint files that are either whole or absent, and that hold tensors and plain data only."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vision_peft.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk and renames; reads without executing code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, staging = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(staging, 0o644)  # mkstemp gives 0600
            os.replace(staging, target)
        finally:
            Path(staging).unlink(missing_ok=True)

    def load_checkpoint(self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such checkpoint")
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
            raise UserError(f"{path}: not a complete checkpoint ({str(error).splitlines()[0]})") from error


class LatestCheckpoint(ModelCheckpoint):
    """One file, checkpoints/last.ckpt, that holds the latest state: every so many steps, and the end.

    No epoch is chosen by validation: the few-shot protocols test the last iterate.

    Args:
        steps: optimizer steps between two writes.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(filename="last", every_n_train_steps=steps, save_top_k=1, enable_version_counter=False)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_end(trainer, module)
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
