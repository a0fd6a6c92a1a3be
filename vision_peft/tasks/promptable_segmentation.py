"""Segmentation by a promptable network: an image encoder, a prompt (or none), a mask decoder; scores at the pictures' own size."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torchmetrics.classification import BinaryAUROC

from vision_peft.backbones.segmentation import Masks, Prompts, SegmentationBackbone
from vision_peft.data.mask_dataset import Case, read_picture
from vision_peft.errors import UserError
from vision_peft.report.overlays import save_overlays
from vision_peft.tasks.base import Task
from vision_peft.tasks.cache import HiddenStates
from vision_peft.tasks.mask_files import write_mask, write_volume
from vision_peft.tasks.operating_point import OperatingPoint
from vision_peft.tasks.prompting import NoPrompt, Prompting, prompt_part
from vision_peft.tasks.segmentation_inference import probabilities, sliding, whole
from vision_peft.tasks.segmentation_losses import DiceCE, SegmentationLoss, settle
from vision_peft.tasks.segmentation_metrics import mean_scores, score


class PromptableSegmentation(Task):
    """Segment what the masks show, with SAM or another SegmentationBackbone.

    Logged: train/loss; val/dice_image, val/dice_pooled, val/threshold; on test the means of segmentation_metrics with these names, and
    test/auc over all pixels that count. With a semantic head each is the mean over the classes, and test/dice_image/NAME one class's.
    Into the run's folder go cases.csv (a row a picture and class) and overlays.png (worst, median and best picture).

    Args:
        backbone: gives masks.
        prompt: what it is asked; only where the data ask for one object (`data.one`) need it be more than NoPrompt or ClassText.
        loss: at the resolution of the training masks, to which logits are resized.
        low_resolution: take the loss at the resolution of the logits instead (SAMed).
        threshold: of the one target's probability; null chooses it on the val split after every validation, 0.5 without one.
        cache: compute what lies before the first adapted layer once, where training pictures never change (data.augment: none).
        optimizer, schedule, min_lr, warmup_steps, head_lr: see Task.
    """

    def __init__(
        self,
        backbone: SegmentationBackbone,
        prompt: Prompting | None = None,
        loss: SegmentationLoss | None = None,
        low_resolution: bool = False,
        threshold: float | None = None,
        cache: Literal["memory", "disk", "off"] = "memory",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        schedule: Literal["cosine", "constant"] = "cosine",
        min_lr: float = 1e-6,
        warmup_steps: int = 0,
        head_lr: float | None = None,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, min_lr, warmup_steps, head_lr)
        if threshold is not None and not 0 < threshold < 1:
            raise UserError(f"model.threshold: must be between 0 and 1, not {threshold}")
        self.criterion, self.low_resolution, self.cache = loss or DiceCE(), low_resolution, cache
        self.prompting = prompt or NoPrompt()
        if not backbone.takes_prompts and not isinstance(self.prompting, NoPrompt):
            raise UserError(f"model.prompt: {type(backbone).__name__} takes no prompts")
        self.point = OperatingPoint(threshold)
        self._pictures: Any = None  # the training data whose place cached hidden states have taken
        self._cut: int | None = None

    # ---- set-up ----

    def prepare(self, trainer: pl.Trainer) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            more = "a promptable decoder has parts that a step does not use (other prompts, other masks)"
            raise UserError(f"trainer.strategy: set it to ddp_find_unused_parameters_true: {more}")
        trainer.datamodule.preprocess = self.backbone.preprocess
        super().prepare(trainer)

    def build(self, data: Any) -> None:
        self.class_names = list(data.class_names)
        heads, classes = self.backbone.classes, len(self.class_names)
        if heads is None and classes > 1:
            raise UserError(f"model.backbone.classes: is null, but the masks hold {classes} classes: set it to that (or data.one: true)")
        if heads is not None and heads != classes:
            raise UserError(f"model.backbone.classes: is {heads}, but the masks hold {classes} classes")
        if data.patch is not None and self.prompting.needs_target:
            raise UserError("data.patch: windows have no masks to take prompts from; use NoPrompt or ClassText, or whole pictures")
        self.prompting.build(self.backbone, self.class_names[0])
        for name, part in prompt_part(self.prompting).items():
            self.add_part(name, part)
        self.add_part("operating_point", self.point)
        self.area = BinaryAUROC(thresholds=1000)

    def facts(self) -> dict[str, Any]:
        return {"class_names": self.class_names, "threshold": float(self.point.threshold)}

    def configure_optimizers(self) -> dict[str, Any] | None:
        self._hand_out_hidden_states()  # now: counting the steps of an epoch makes Lightning build the training loader
        return super().configure_optimizers()

    def _hand_out_hidden_states(self) -> None:
        data = self.trainer.datamodule
        block = self.backbone.first_block(set(self.backbone.adapted))
        if self.cache == "off" or block == 0 or data.train_dataset.views is None:
            return
        self._pictures = data.train_dataset
        precision, disk = self.trainer.precision_plugin, self.cache == "disk"
        data.train_dataset = HiddenStates(self._pictures, self.backbone, block, self.device, precision, disk, self.frozen_fingerprint)
        self._cut = block

    def on_fit_end(self) -> None:
        if self._pictures is not None:  # what follows sees pictures again
            self.trainer.datamodule.train_dataset, self._pictures, self._cut = self._pictures, None, None

    # ---- training ----

    def forward(self, images: Tensor, prompts: Prompts | None = None) -> Masks:
        """Masks of preprocessed images (B, 3, S, S)."""
        return self.backbone.decode(self.backbone(images), prompts)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        images, target, valid = batch["image"], batch["target"], batch["valid"]
        prompts = self.prompting(target, batch["draw"].tolist())
        if self._cut is None:
            masks = self(images, prompts)
        else:
            masks = self.backbone.decode(self.backbone.suffix(images, self._cut), prompts)
        logits = masks.logits.float()
        if self.low_resolution:
            size = logits.shape[-2:]
            target, valid = (F.interpolate(each[:, None].float(), size, mode="nearest-exact")[:, 0] for each in (target, valid))
            target, valid = target.long(), valid > 0.5
        else:
            logits = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
        with torch.autocast(logits.device.type, enabled=False):
            return self.criterion(*settle(logits, target, valid))

    # ---- evaluation ----

    def predicted(self, cases: list[Case]) -> list[Tensor]:
        """Probabilities (K, H, W) of each case at its picture's own size, on the CPU."""
        data = self.trainer.datamodule
        if data.patch is not None:
            options = {"patch": data.patch, "size": self.backbone.preprocess.size, "overlap": data.overlap, "batch": data.eval_batch_size}
            found = [sliding(case, self._unprompted, self.device, **options) for case in cases]
        else:
            prompts = self.prompting(self._squares(cases), [case.draw for case in cases])
            found = whole(cases, self.backbone, lambda embedding: self.backbone.decode(embedding, prompts).logits, self.device)
        return [probabilities(logits) for logits in found]

    def _unprompted(self, images: Tensor) -> Tensor:
        nothing = torch.zeros(len(images), 1, 1, device=images.device)
        return self(images, self.prompting(nothing, [0] * len(images))).logits

    def _squares(self, cases: list[Case]) -> Tensor:
        """The cases' targets (B, S, S) as the network's input shows them."""
        return torch.stack([case.frame.fit(case.target[None], labels=True)[0] for case in cases]).to(self.device)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Cases stay on the CPU: what the network sees of them is moved piece by piece."""
        return batch if isinstance(batch, list) else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def validation_step(self, batch: list[Case], batch_idx: int) -> None:
        for case, probability in zip(batch, self.predicted(batch)):
            if self.backbone.classes is None:
                self.point.feed(probability[0].numpy(), case.target.numpy() > 0, case.valid.numpy())
            else:
                self._rows += self._scored(case, probability)[0]

    def on_validation_epoch_start(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:  # a look at two batches before training chooses nothing
            self.point.histograms.clear()
            return
        if self.backbone.classes is None:
            self.point.histograms = self._of_all_processes(self.point.histograms)
            dice = self.point.choose()
            self.log("val/threshold", self.point.threshold.clone())
        else:
            dice = mean_scores(self._of_all_processes(self._rows))["dice_image"]
        self.log("val/dice_image", dice, prog_bar=True)

    def _of_all_processes(self, items: list[Any]) -> list[Any]:
        """Each process has seen a part of the pictures; all choose by all of them."""
        if self.trainer.world_size == 1:
            return items
        parts: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def on_test_epoch_start(self) -> None:
        self._rows, self._shown = [], []
        self.area.reset()

    def test_step(self, batch: list[Case], batch_idx: int) -> None:
        for case, probability in zip(batch, self.predicted(batch)):
            rows, labels = self._scored(case, probability)
            if self.backbone.classes is None:
                self.area.update(probability[0][case.valid].to(self.device), (case.target[case.valid] > 0).long().to(self.device))
            self._rows += rows
            dice = sum(row["dice_image"] for row in rows) / len(rows)
            self._shown.append((dice, case.record, case.target.numpy(), labels, case.valid.numpy()))

    def on_test_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            raise UserError("trainer.devices: a test of segmentation is run by one process; set it to 1")
        found = mean_scores(self._rows)
        if len(self.class_names) > 1:
            for name in self.class_names:
                found[f"dice_image/{name}"] = mean_scores([row for row in self._rows if row["class"] == name])["dice_image"]
        if self.backbone.classes is None:
            found["auc"] = float(self.area.compute())
        self.log_dict({f"test/{key}": value for key, value in found.items()})
        if not self.trainer.fast_dev_run:
            self._write_cases()
            self._write_overlays()

    def _scored(self, case: Case, probability: Tensor) -> tuple[list[dict[str, Any]], np.ndarray]:
        """A row of scores a class, and the predicted labels (H, W)."""
        labels, target, valid = self._labels(probability), case.target.numpy(), case.valid.numpy()
        place = {"picture": case.record.name, "object": "" if case.object is None else case.object}
        if self.backbone.classes is None:
            rows = [{**place, "class": self.class_names[0], **score(labels > 0, target > 0, valid, case.spacing)}]
        else:
            numbered = list(enumerate(self.class_names, start=1))
            rows = [{**place, "class": name, **score(labels == i, target == i, valid, case.spacing)} for i, name in numbered]
        return rows, labels

    def _labels(self, probability: Tensor) -> np.ndarray:
        """uint8 (H, W): 1 for the target, or class indices."""
        if self.backbone.classes is None:
            return (probability[0] >= self.point.threshold.cpu()).numpy().astype(np.uint8)
        return probability.argmax(0).numpy().astype(np.uint8)

    def _write_cases(self) -> None:
        with (self._folder() / "cases.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self._rows[0]))
            writer.writeheader()
            for row in self._rows:
                writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})

    def _write_overlays(self) -> None:
        ranked = sorted(self._shown, key=lambda each: each[0])
        chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
        rows = []
        for what, (dice, record, target, labels, valid) in chosen.items():
            image = read_picture(record, self.trainer.datamodule.decoding).image.permute(1, 2, 0).numpy()
            rows.append((f"{what}: {record.name}, Dice {dice:.3f}", image, target, labels, valid))
        save_overlays(rows, self._folder() / "overlays.png")

    # ---- prediction ----

    def on_predict_start(self) -> None:
        if self.trainer.world_size > 1:
            raise UserError("trainer.devices: predictions are written by one process; set it to 1")
        self._written, self._volumes = 0, {}

    def predict_step(self, batch: list[Case], batch_idx: int) -> None:
        folder = self._folder() / "masks"
        for case, probability in zip(batch, self.predicted(batch)):
            labels = self._stored(self._labels(probability))
            if case.record.slice is not None:
                self._volumes.setdefault(case.record.image, []).append(labels)
            else:
                place = case.record.image.relative_to(self.trainer.datamodule.predict_folder).parent
                write_mask(folder / place, case.record.image, case.record.image.stem, labels)
                self._written += 1

    def on_predict_end(self) -> None:
        folder = self._folder() / "masks"
        for source, slices in self._volumes.items():
            write_volume(folder / source.relative_to(self.trainer.datamodule.predict_folder).parent, source, slices)
            self._written += 1
        print(f"masks: {folder} ({self._written} files)")

    def _stored(self, labels: np.ndarray) -> np.ndarray:
        """Class indices as the numbers that stand for the classes in the set's own masks; 255 for the one target without a number."""
        given = self.trainer.datamodule.classes
        numbers = np.array([0, *(list(given) if given else [255])])
        return numbers[labels].astype(np.uint8 if numbers.max() < 256 else np.uint16)

    def _folder(self) -> Path:
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
