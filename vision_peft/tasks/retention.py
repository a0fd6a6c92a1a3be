"""Zero-shot retention: what adapting to one set did to the accuracy on others, for backbones with a text tower."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

from vision_peft.errors import UserError


class ZeroShotRetention(pl.Callback):
    """Zero-shot accuracy on other sets before the first step and after the last, top-1 in [0, 1] on their test splits, by prompts alone.

    Logged: `retention/NAME/before`, `retention/NAME/after` for each set; `retention/before`, `retention/after`, their means over the
    sets, and `retention/difference`; `retention/harmonic`, the harmonic mean of `retention/after` and the accuracy that the run
    reached on the test split of its own data (0 where either is 0): high only for what learns and does not forget.

    Args:
        sets: by name, data modules with classes and a prompt template of their own; one that is the run's own (the same test pictures
            and prompts) is left out, so that one list serves runs on each of its sets.
    """

    def __init__(self, sets: dict[str, pl.LightningDataModule]) -> None:
        if not sets:
            raise UserError("ZeroShotRetention: name at least one set")
        self.sets = sets
        self.before: dict[str, float] | None = None

    def setup(self, trainer: pl.Trainer, task: Any, stage: str) -> None:
        if stage == "fit":
            trainer.datamodule.setup("test")

    def on_fit_start(self, trainer: pl.Trainer, task: Any) -> None:
        if not hasattr(task.backbone, "text_features"):
            raise UserError(f"ZeroShotRetention needs a backbone with a text tower; {type(task.backbone).__name__} has none")
        for data in self.sets.values():
            data.preprocess = task.backbone.preprocess
            data.setup("test")
        self.sets = {name: data for name, data in self.sets.items() if not _same(data, trainer.datamodule)}
        if not self.sets:
            raise UserError("ZeroShotRetention: names no set besides the run's own")
        if self.before is None:  # a resumed run has it from its checkpoint
            self.before = self._zero_shot(trainer, task)

    def on_train_end(self, trainer: pl.Trainer, task: Any) -> None:
        after, own = self._zero_shot(trainer, task), self._own(trainer, task)
        values = {f"retention/{name}/before": value for name, value in self.before.items()}
        values |= {f"retention/{name}/after": value for name, value in after.items()}
        means = _mean(self.before), _mean(after)
        values |= {"retention/before": means[0], "retention/after": means[1], "retention/difference": means[1] - means[0]}
        values["retention/harmonic"] = 2 * own * means[1] / (own + means[1]) if own and means[1] else 0.0
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
        if trainer.is_global_zero:
            for name, value in after.items():
                print(f"zero-shot accuracy on {name}: {self.before[name]:.4f} before, {value:.4f} after")

    def _zero_shot(self, trainer: pl.Trainer, task: Any) -> dict[str, float]:
        """Top-1 of the backbone as it stands on every set."""

        def classifier(data: Any) -> Any:
            text = F.normalize(task.backbone.encode_text(task.backbone.tokenize(data.prompts())), dim=1)
            return lambda images: F.normalize(task.backbone(images), dim=1) @ text.mT

        return {name: _accuracy(trainer, task, data, classifier) for name, data in self.sets.items()}

    @staticmethod
    def _own(trainer: pl.Trainer, task: Any) -> float:
        return _accuracy(trainer, task, trainer.datamodule, lambda data: task)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = state["before"]


@torch.no_grad()
def _accuracy(trainer: pl.Trainer, task: Any, data: Any, classifier: Any) -> float:
    """Top-1 of classifier(data), images -> logits, on the test split, in the run's precision; leaves modes as they were."""
    training = task.training
    task.eval()
    right = total = 0
    with trainer.precision_plugin.forward_context():
        scores = classifier(data)
        for images, labels in data.test_dataloader():
            right += int((scores(images.to(task.device)).argmax(1).cpu() == labels).sum())
            total += len(labels)
    task.train(training)
    return right / total


def _same(data: Any, own: Any) -> bool:
    return data.test_records == own.test_records and data.prompts() == own.prompts()


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
