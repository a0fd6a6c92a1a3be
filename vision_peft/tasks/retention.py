"""Zero-shot retention: what adapting to one set did to the accuracy on another, for backbones with a text tower."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

from vision_peft.errors import UserError


class ZeroShotRetention(pl.Callback):
    """Logs retention/before, retention/after (top-1 in [0, 1] on the test split of `data`, by prompts alone) and their difference.

    Args:
        data: another set, with its own classes and prompt template.
    """

    def __init__(self, data: pl.LightningDataModule) -> None:
        self.data = data
        self.before: float | None = None

    def on_fit_start(self, trainer: pl.Trainer, task: Any) -> None:
        if not hasattr(task.backbone, "text_features"):
            raise UserError(f"ZeroShotRetention needs a backbone with a text tower; {type(task.backbone).__name__} has none")
        self.data.preprocess = task.backbone.preprocess
        self.data.setup("test")
        if self.before is None:  # a resumed run has it from its checkpoint
            self.before = self.accuracy(task)

    def on_train_end(self, trainer: pl.Trainer, task: Any) -> None:
        after = self.accuracy(task)
        values = {"retention/before": self.before, "retention/after": after, "retention/difference": after - self.before}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
        if trainer.is_global_zero:
            print(f"zero-shot accuracy on the second set: {self.before:.4f} before, {after:.4f} after")

    @torch.no_grad()
    def accuracy(self, task: Any) -> float:
        """Top-1 of the backbone as it stands, on the second set."""
        backbone, training = task.backbone, task.training
        task.eval()
        text = F.normalize(backbone.encode_text(backbone.tokenize(self.data.prompts())), dim=1)
        right = total = 0
        for images, labels in self.data.test_dataloader():
            features = F.normalize(backbone(images.to(task.device)), dim=1)
            right += int(((features @ text.mT).argmax(1).cpu() == labels).sum())
            total += len(labels)
        task.train(training)
        return right / total

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = state["before"]
