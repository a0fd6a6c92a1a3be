"""A quality-aware encoder without labels: momentum contrast in which a pair is two places of one picture under one distortion.

    L = -log( exp(q . k+ / t) / (exp(q . k+ / t) + sum over K- of exp(q . k / t)) )

q, k: unit codes of a query and a key crop; k+: the same version of the same picture at the same scale; K-: the queue, and the keys of the
picture's other versions at that scale. The released code leaves those out (negatives: queue), and its half-swap then does nothing.

The encoder is either a frozen pretrained one with an adapter (an extension of the paper: cheap, few pictures), or trained whole.
Source: Saha, Mishra, Bovik, "Re-IQA", CVPR 2023; avinabsaha/ReIQA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor
from torchmetrics import MeanMetric

from vision_peft.backbones.encoder_folder import save_encoder
from vision_peft.backbones.vit import Vit
from vision_peft.errors import UserError
from vision_peft.tasks.base import Task
from vision_peft.tasks.momentum_contrast import FollowingCopy, KeyQueue, ProjectionHead, contrast


class QualityContrast(Task):
    """Trains on PristineImages.

    Logs train/loss, and on held-out pictures val/match: how often the key of a query's own version is the most similar one among its
    picture's versions at that scale (chance is 1 in n + 1; the version that is swapped against it has the query's content).

    Args:
        backbone: see Vit.
        normalize: of the input in [0, 1]: `backbone` by the pretrained network's mean and std; `none` as the paper's encoder.
        whole: train every weight of the backbone and its BatchNorm statistics instead of adapting it; written to RUN/encoder.
        negatives: see above.
        temperature: t.
        momentum: m of the key encoder, which follows after every optimizer step.
        queue: number of past keys.
        code: length of the codes.
    """

    def __init__(
        self,
        backbone: Vit,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        schedule: Literal["cosine", "constant"] = "cosine",
        min_lr: float = 1e-6,
        warmup_steps: int = 0,
        head_lr: float | None = None,
        normalize: Literal["backbone", "none"] = "backbone",
        whole: bool = False,
        negatives: Literal["queue+same_image", "queue"] = "queue+same_image",
        temperature: float = 0.2,
        momentum: float = 0.999,
        queue: int = 65536,
        code: int = 128,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, min_lr, warmup_steps, head_lr)
        if not 0 <= momentum <= 1:
            raise UserError(f"model.momentum: must be from 0 to 1, not {momentum}")
        for name, value in (("temperature", temperature), ("queue", queue), ("code", code)):
            if value <= 0:
                raise UserError(f"model.{name}: must be positive, not {value}")
        self.normalize, self.whole, self.negatives, self.code = normalize, whole, negatives, code
        self.temperature, self.momentum, self.queue_size = temperature, momentum, queue
        self.match = MeanMetric()
        self._fresh: Tensor | None = None  # keys of the running batch

    def build(self, data: pl.LightningDataModule) -> None:
        if data is not None and not hasattr(data, "views"):
            raise UserError(f"data: {type(data).__name__} gives no pairs of crops; this task needs PristineImages")
        if self.whole:
            self.backbone.unfreeze()
            self.add_part("backbone", self.backbone)
        self.add_part("head", ProjectionHead(self.backbone.num_features, self.code), scaffold=True)
        self.add_part("queue", KeyQueue(self.queue_size, self.code, torch.Generator().manual_seed(0)), scaffold=True)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if "keys" not in self.parts:  # now: the adapters are in place
            if self.whole and "adapters" in self.parts:
                raise UserError("model.whole: trains every weight, and an adapter would have nothing to adapt: set adapter.method to null")
            self.train()
            self.add_part("keys", FollowingCopy(self), scaffold=True)

    def forward(self, images: Tensor) -> Tensor:
        """Unit codes (B, code) of crops (B, 3, P, P) in [0, 1]."""
        return self.head(self.backbone(self.normalized(images)))

    def normalized(self, images: Tensor) -> Tensor:
        if self.normalize == "none":
            return images
        mean, std = (torch.tensor(each, device=images.device)[:, None, None] for each in self._mean_std())
        return (images - mean) / std

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        query = self(batch["query"].flatten(0, 1))
        if "keys" in self.parts:
            key = self.keys(self, batch["key"].flatten(0, 1))
        else:  # a calibration pass before training, when the copy would be equal
            with torch.no_grad():
                key = self(batch["key"].flatten(0, 1))
        self._fresh = key
        versions = batch["query"].shape[1] // 2
        codes = (each.unflatten(0, (-1, versions)) for each in (query, key))
        return contrast(*codes, self.queue.keys, self.temperature, self.negatives == "queue+same_image")

    def on_after_backward(self) -> None:
        """The queue moves on now: before a checkpoint of this batch is written, and after the gradient has used it."""
        keys = self.all_gather(self._fresh).flatten(0, -2) if self.trainer.world_size > 1 else self._fresh
        self.queue.push(keys)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.keys.follow(self, self.momentum)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        versions = batch["query"].shape[1] // 2
        query, key = (self(batch[name].flatten(0, 1)).unflatten(0, (-1, versions)) for name in ("query", "key"))
        best = (query @ key.transpose(1, 2)).argmax(2)
        self.match.update(best == torch.arange(versions, device=best.device))

    def on_validation_epoch_end(self) -> None:
        self.log("val/match", self.match.compute(), prog_bar=True)  # over all processes, also those that had no picture
        self.match.reset()

    def facts(self) -> dict[str, Any]:
        """What an expert must know of its input."""
        mean, std = self._mean_std()
        return {"task": "quality", "input": {"mean": list(mean), "std": list(std)}}

    def on_fit_end(self) -> None:
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "encoder"
        if self.whole and not self.trainer.fast_dev_run:
            self._export(folder)

    @rank_zero_only
    def _export(self, folder: Path) -> None:
        save_encoder(folder, self.backbone, self.facts())
        rank_zero_info(f"encoder: {folder} ({sum(each.numel() for each in self.backbone.parameters()):,} numbers)")

    def _mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.normalize == "none":
            return (0.0,) * 3, (1.0,) * 3
        return self.backbone.preprocess.mean, self.backbone.preprocess.std
