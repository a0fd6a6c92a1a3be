"""What every task shares: the backbone, the parts that are trained, the optimizer over them, checkpoints that hold just those parts."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from vision_peft.backbones.base import Backbone
from vision_peft.engine.fingerprint import fingerprint
from vision_peft.engine.install import frozen_weights
from vision_peft.errors import UserError


class Task(pl.LightningModule):
    """A LightningModule around a frozen backbone.

    Trained are the declared parts and nothing else: the task's own (a head), and those that a callback adds. A part may
    bring `param_groups(lr)`, `penalty()`, and `take_sizes(stored)` where the shapes of its tensors follow from training pictures.

    Args:
        backbone: its weights are read by prepare(), not at construction.
        optimizer: called with the parameter groups.
        schedule: of the learning rate, stepped with every optimizer step over the whole run.
        min_lr: where `cosine` ends.
        warmup_steps: linear rise from a hundredth of the rate.
        head_lr: rate of the task's own parts; null for the optimizer's.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        schedule: Literal["cosine", "constant"] = "cosine",
        min_lr: float = 1e-6,
        warmup_steps: int = 0,
        head_lr: float | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.optimizer, self.schedule, self.min_lr = optimizer, schedule, min_lr
        self.warmup_steps, self.head_lr = warmup_steps, head_lr
        self.parts: dict[str, nn.Module] = {}
        self.scaffold: set[str] = set()
        self.frozen_fingerprint: str | None = None
        self._prepared = False
        self._random_state: dict[str, Any] | None = None

    # ---- life of a run ----

    def prepare(self, trainer: pl.Trainer) -> None:
        """Load the backbone and build the parts, once, before anything is put on the backbone."""
        if not self._prepared:
            self.backbone.load()
            self.build(trainer.datamodule)
            if "backbone" not in self.parts:  # else the checkpoint holds all of it
                self.frozen_fingerprint = fingerprint(self.backbone.network, self.backbone.resized)
            self._prepared = True

    def setup(self, stage: str) -> None:
        self.prepare(self.trainer)

    @abstractmethod
    def build(self, data: pl.LightningDataModule) -> None:
        """Make the task's own parts (add_part) from what the data say; the backbone is loaded."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """Scalar loss of a training batch, without the parts' penalties."""

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts that an exported adapter should carry, e.g. class names."""
        return {}

    def add_part(self, name: str, part: nn.Module, scaffold: bool = False) -> None:
        """Declare a trained module: optimized, saved in checkpoints under its name, demanded on resume.

        Args:
            scaffold: needed in training only: not exported with the adapter.
        """
        self.parts[name] = part
        self.scaffold |= {name} if scaffold else set()
        self.add_module(name, part)

    def frozen(self) -> AbstractContextManager[None]:
        """Within the block the backbone computes with its frozen weights alone, whatever is on it, merged or not."""
        return frozen_weights(self.backbone.network)

    # ---- optimization ----

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        penalties = [part.penalty() for part in self.parts.values() if hasattr(part, "penalty")]
        total = sum(penalty for penalty in penalties if isinstance(penalty, Tensor))
        if isinstance(total, Tensor):
            self.log("train/penalty", total)
            loss = loss + total
        return loss

    def configure_optimizers(self) -> dict[str, Any] | None:
        lr = self.optimizer([nn.Parameter(torch.zeros(1))]).defaults["lr"]
        groups: list[dict[str, Any]] = []
        for name, part in self.parts.items():
            if hasattr(part, "param_groups"):
                groups += part.param_groups(lr)
            else:
                own = [parameter for parameter in part.parameters() if parameter.requires_grad]
                groups.append({"params": own, "lr": lr if self.head_lr is None else self.head_lr, "name": name})
        groups = [group for group in groups if group["params"]]
        if not groups and self.trainer.max_steps == 0:  # a zero-shot classifier in a table beside trained ones
            return None
        if not groups:
            raise UserError(
                "nothing to train: no adapter method is set and the head has no parameters; run test, or set trainer.max_steps to 0"
            )
        optimizer = self.optimizer(groups)
        scheduler = self._scheduler(optimizer)
        return {"optimizer": optimizer, **({"lr_scheduler": {"scheduler": scheduler, "interval": "step"}} if scheduler else {})}

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("trainer: give max_steps or max_epochs; the learning rate and the methods' schedules count towards the end")
        total = int(steps)
        warmup = min(self.warmup_steps, max(total - 1, 0))
        rise = LinearLR(optimizer, start_factor=0.01, total_iters=warmup) if warmup else None
        if self.schedule == "constant":
            return rise
        fall = CosineAnnealingLR(optimizer, T_max=max(total - warmup, 1), eta_min=self.min_lr)
        return SequentialLR(optimizer, [rise, fall], milestones=[warmup]) if rise else fall

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained parts, what the frozen rest must be, and the random state that dropout continues from."""
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if self._is_trained(key)}
        checkpoint["backbone_fingerprint"] = self.frozen_fingerprint
        checkpoint["random_state"] = self._random_states()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Demand exactly the trained keys, then hand Lightning's strict loading the frozen rest as it stands."""
        stored, source = checkpoint["state_dict"], self.trainer.ckpt_path or "checkpoint"
        if checkpoint.get("backbone_fingerprint") != self.frozen_fingerprint:
            raise UserError(f"{source}: it belongs to another backbone (fingerprints differ): check the model's name, depth and weights")
        for name, part in self.parts.items():
            if hasattr(part, "take_sizes"):
                part.take_sizes({key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")})
        own = self.state_dict()
        trained = {key for key in own if self._is_trained(key)}
        for key in sorted(trained ^ stored.keys()):
            raise UserError(f"{source}: trained key {key!r} is {'missing' if key in trained else 'not expected'}")
        for key in trained:
            if own[key].shape != stored[key].shape:
                raise UserError(f"{source}: {key!r} has shape {tuple(stored[key].shape)}, expected {tuple(own[key].shape)}")
        checkpoint["state_dict"] = {**own, **stored}
        states = checkpoint.get("random_state", [])
        if len(states) == self.trainer.world_size:
            self._random_state = states[self.trainer.global_rank]
        else:
            rank_zero_warn(f"resuming {len(states)} processes on {self.trainer.world_size}: what dropout draws will differ")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._random_state is not None:  # the first step after a resume draws what it would have drawn
            torch.set_rng_state(self._random_state["cpu"].cpu())
            if "cuda" in self._random_state:
                torch.cuda.set_rng_state(self._random_state["cuda"].cpu(), self.device)
            self._random_state = None

    def _is_trained(self, key: str) -> bool:
        return key.partition(".")[0] in self.parts

    def _random_states(self) -> list[dict[str, Tensor]]:
        """The states of torch's generators, one entry a process: each draws its own dropout masks."""
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.trainer.world_size == 1:
            return [own]
        states: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(states, own)
        return states
