"""What a run was good for: test accuracy before the first step and after the last."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch


class BeforeAfter(pl.Callback):
    """Prints and logs before/accuracy and after/accuracy, top-1 in [0, 1] on the whole test split of the run's data."""

    def __init__(self) -> None:
        self.before: float | None = None

    def setup(self, trainer: pl.Trainer, task: Any, stage: str) -> None:
        if stage == "fit":
            trainer.datamodule.setup("test")

    def on_fit_start(self, trainer: pl.Trainer, task: Any) -> None:
        if self.before is None:  # a resumed run has it from its checkpoint
            self.before = self.accuracy(trainer, task)

    def on_train_end(self, trainer: pl.Trainer, task: Any) -> None:
        after = self.accuracy(trainer, task)
        trainer.callback_metrics.update({"before/accuracy": torch.tensor(self.before), "after/accuracy": torch.tensor(after)})
        for logger in trainer.loggers:
            logger.log_metrics({"before/accuracy": self.before, "after/accuracy": after}, step=trainer.global_step)
        if trainer.is_global_zero:
            print(f"test accuracy: {self.before:.4f} before, {after:.4f} after ({len(trainer.datamodule.test_records)} images)")

    @torch.no_grad()
    def accuracy(self, trainer: pl.Trainer, task: Any) -> float:
        training = task.training
        task.eval()
        right = total = 0
        with trainer.precision_plugin.forward_context():
            for images, labels in trainer.datamodule.test_dataloader():
                right += int((task(images.to(task.device)).argmax(1).cpu() == labels).sum())
                total += len(labels)
        task.train(training)
        counts = trainer.strategy.reduce(torch.tensor([right, total], device=task.device), reduce_op="sum")
        return float(counts[0] / counts[1])

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = state["before"]
