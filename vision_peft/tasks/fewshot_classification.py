"""Few-shot image classification: a backbone, a head, cross-entropy; accuracy, calibration and a confusion matrix at the end."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from vision_peft.backbones.base import Backbone
from vision_peft.errors import UserError
from vision_peft.report.confusion import save_confusion
from vision_peft.tasks.base import Task
from vision_peft.tasks.cache import HiddenStates
from vision_peft.tasks.heads import FrozenFeatures, Head, LinearHead


class FewShotClassification(Task):
    """Classify images into the data module's classes.

    Logged: train/loss, val/loss, val/accuracy, and on test: test/accuracy (top-1), test/macro_f1, test/calibration_error (expected,
    15 bins), all in [0, 1]; per-class accuracy and the confusion matrix go into the run's folder.

    Args:
        backbone: features out of images.
        head: class scores out of features.
        label_smoothing: in [0, 1).
        cache: compute what lies before the first adapted layer once and train on that, for training data that do not change from
            epoch to epoch or cycle through a fixed number of views: `memory`, `disk` (kept for the next run), `off`.
        optimizer, schedule, min_lr, warmup_steps, head_lr: see Task.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head | None = None,
        label_smoothing: float = 0.0,
        cache: Literal["memory", "disk", "off"] = "memory",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        schedule: Literal["cosine", "constant"] = "cosine",
        min_lr: float = 1e-6,
        warmup_steps: int = 0,
        head_lr: float | None = None,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, min_lr, warmup_steps, head_lr)
        self.label_smoothing, self.cache = label_smoothing, cache
        self.head = head if head is not None else LinearHead()
        self.class_names: list[str] = []
        self._pictures: dict[str, Any] = {}  # datasets whose place cached hidden states have taken
        self._cut: int | None = None  # block at which cached hidden states enter, while training

    # ---- set-up ----

    def prepare(self, trainer: pl.Trainer) -> None:
        trainer.datamodule.preprocess = self.backbone.preprocess  # every time: a test may bring a data module of its own
        super().prepare(trainer)

    def build(self, data: Any) -> None:
        self.class_names = list(data.class_names)
        self.head.build(self.backbone, data.prompts(), self._frozen_features(data) if self.head.needs_features else None)
        self.add_part("head", self.head)
        classes = len(self.class_names)
        self.val_metrics = MetricCollection({"val/accuracy": MulticlassAccuracy(classes, average="micro")})
        self.test_metrics = MetricCollection(
            {
                "test/accuracy": MulticlassAccuracy(classes, average="micro"),
                "test/macro_f1": MulticlassF1Score(classes, average="macro"),
                "test/calibration_error": MulticlassCalibrationError(classes, n_bins=15),
            }
        )
        self.confusion = MulticlassConfusionMatrix(classes)

    def facts(self) -> dict[str, Any]:
        return {"class_names": self.class_names}

    def configure_optimizers(self) -> dict[str, Any]:
        self._hand_out_hidden_states()  # now: counting the steps of an epoch makes Lightning build the training loader
        return super().configure_optimizers()

    def _hand_out_hidden_states(self) -> None:
        data = self.trainer.datamodule
        block = self.backbone.first_block(set(self.backbone.adapted))
        if self.cache == "off" or block == 0 or data.train_dataset.views is None:
            return
        for name in ("train_dataset", "val_dataset") if data.val_records else ("train_dataset",):
            pictures = self._pictures[name] = getattr(data, name)
            setattr(data, name, self._hidden_states(pictures, block))
        self._cut = block

    def _hidden_states(self, pictures: Any, block: int) -> HiddenStates:
        precision, disk = self.trainer.precision_plugin, self.cache == "disk"
        return HiddenStates(pictures, self.backbone, block, self.device, precision, disk, self.frozen_fingerprint)

    @torch.no_grad()
    def _frozen_features(self, data: Any) -> FrozenFeatures | None:
        """Of the pictures that the head asks for as evaluation sees them, before anything is put on the backbone."""
        if not data.train_records:
            return None
        training = self.backbone.training
        self.backbone.eval()
        held_out = self._features(data.val_dataset) if self.head.needs_held_out and data.val_records else None
        found = FrozenFeatures(*self._features(data.plain_train_dataset()), len(self.class_names), held_out)
        self.backbone.train(training)
        return found

    def _features(self, pictures: Any) -> tuple[Tensor, Tensor]:
        """(N, D) and labels (N,)."""
        with self.trainer.precision_plugin.forward_context():
            if self.cache == "disk" and self.backbone.num_blocks:  # methods compared on the same pictures compute this once
                states = DataLoader(self._hidden_states(pictures, self.backbone.num_blocks), batch_size=64)
                features = [self.backbone.suffix(hidden, self.backbone.num_blocks) for hidden, _ in states]
            else:
                features = [self.backbone(images) for images, *_ in DataLoader(pictures, batch_size=64)]
        return torch.cat(features), torch.tensor([record.label for record in pictures.records])

    # ---- steps ----

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of preprocessed images (B, 3, S, S)."""
        return self.head(self.backbone(images))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self._logits(inputs), labels, label_smoothing=self.label_smoothing)

    def _logits(self, inputs: Tensor) -> Tensor:
        """Logits of images, or of cached hidden states while they take the images' place."""
        return self(inputs) if self._cut is None else self.head(self.backbone.suffix(inputs, self._cut))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        logits = self._logits(inputs).float()
        self.log("val/loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.val_metrics.update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics.compute(), prog_bar=True)
        self.val_metrics.reset()

    def on_fit_end(self) -> None:
        for name, pictures in self._pictures.items():  # what follows, such as a test, sees pictures again
            setattr(self.trainer.datamodule, name, pictures)
        self._pictures.clear()
        self._cut = None

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        probabilities = self(images).float().softmax(1)  # the calibration error takes logits within [0, 1] for probabilities
        self.test_metrics.update(probabilities, labels)
        self.confusion.update(probabilities, labels)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics.compute())
        matrix = self.confusion.compute().cpu()
        self.test_metrics.reset()
        self.confusion.reset()
        folder = self._folder()
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            save_confusion(matrix, self.class_names, folder / "confusion.png")
            _write_class_accuracies(matrix, self.class_names, folder / "class_accuracy.csv")

    # ---- prediction ----

    def on_predict_start(self) -> None:
        if self.trainer.world_size > 1:
            raise UserError("trainer.devices: predictions are written by one process; set it to 1")
        self._predictions: list[tuple[str, str, float]] = []

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> Tensor:
        images, paths = batch
        probabilities = self(images).float().softmax(1)
        best, index = probabilities.max(1)
        self._predictions += [(path, self.class_names[i], p) for path, i, p in zip(paths, index.tolist(), best.tolist())]
        return probabilities

    def on_predict_end(self) -> None:
        path = self._folder() / "predictions.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "class", "probability"])
            writer.writerows((each, name, f"{p:.6f}") for each, name, p in self._predictions)
        print(f"predictions: {path} ({len(self._predictions)} images)")

    def _folder(self) -> Path:
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _write_class_accuracies(matrix: Tensor, names: list[str], path: Path) -> None:
    totals = matrix.sum(1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "accuracy", "images"])
        for name, right, total in zip(names, matrix.diagonal().tolist(), totals.tolist()):
            writer.writerow([name, f"{right / total:.4f}" if total else "", total])
