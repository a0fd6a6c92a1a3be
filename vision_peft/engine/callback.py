"""AdapterCallback: puts the method of a YAML onto the task's backbone and keeps it going through a Lightning run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from vision_peft.engine.adapter import Clock, Method, find_method
from vision_peft.engine.adapter_set import AdapterSet
from vision_peft.engine.evidence import collect
from vision_peft.engine.install import attach, installed, merge, refuse_shared, unmerge
from vision_peft.engine.store import save_adapter
from vision_peft.engine.targets import resolve, table
from vision_peft.errors import UserError


class AdapterCallback(pl.Callback):
    """Installs adapters before training, steps their schedule, and writes the adapter folder at the end.

    Args:
        method: what to put on the backbone; null leaves it frozen: only the task's head (linear probe) and `train` are trained.
        targets: presets and patterns of the layers to adapt, see `vision-peft targets`.
        seed: of the adapters' starts and random bases.
        evidence_batches: training batches of the calibration pass, for methods that need one.
        folder: where the adapter goes after fit; by default `adapter` in the run's folder.
        train: patterns of layers and tensors that are trained whole beside the method, as in full fine-tuning (a decoder, norms).
        train_lr: their learning rate; null for the optimizer's.
    """

    def __init__(
        self,
        method: Method | None = None,
        targets: str | list[str] = "attn+mlp",
        seed: int = 0,
        evidence_batches: int = 8,
        folder: str | None = None,
        train: str | list[str] | None = None,
        train_lr: float | None = None,
    ) -> None:
        self.method, self.targets, self.seed, self.evidence_batches, self.folder = method, targets, seed, evidence_batches, folder
        self.train, self.train_lr = train, train_lr
        if train_lr is not None and not train:
            raise UserError("adapter.train_lr: goes with adapter.train, which is empty")
        self.adapters: AdapterSet | None = None  # of the method; where there is none, of what is trained whole
        self._after_step: Any = None  # handle of the optimizer's hook

    def check(self, backbone: Any) -> None:
        """Raise UserError where method or targets do not fit the backbone; reads no weights."""
        chosen = [(method, resolve(targets, backbone.sites(), method)) for _, method, targets in self._wanted()]
        refuse_shared(*(sites for _, sites in chosen))
        for method, sites in chosen:
            AdapterSet(method, sites)  # a site may refuse a hyper-parameter

    def _wanted(self) -> list[tuple[str, Method, str | list[str]]]:
        """Name, method and targets of the run's adapter sets: the method's, and one of what is trained whole."""
        found = [("default", self.method, self.targets)] if self.method is not None else []
        if self.train:
            found.append(("trained" if found else "default", find_method("full")(), self.train))
        return found

    def setup(self, trainer: pl.Trainer, task: Any, stage: str) -> None:
        task.prepare(trainer)
        network = task.backbone.network
        wanted = self._wanted()
        if not wanted or installed(network):
            return
        sites = [resolve(targets, task.backbone.sites(), method) for _, method, targets in wanted]
        # first: a calibration pass asks what changes, too
        task.backbone.adapted = frozenset(site.target for each in sites for site in each)
        evidence = self._evidence(trainer, task, sites[0]) if wanted[0][1].evidence and stage == "fit" else None
        options = {"sites": task.backbone.sites(), "seed": self.seed, "restoring": stage != "fit"}
        for name, method, targets in wanted:
            given = evidence if name == "default" else None
            adapters = attach(network, method, targets, name=name, evidence=given, beside=name != "default", **options)
            if name == "default":
                self.adapters = adapters
                rank_zero_info(f"{method!r}\n{table(adapters.sites, method, collapse=True)}")
            else:
                adapters.label = f"{name}/"
                numbers = adapters.num_trainable()
                rank_zero_info(f"trained whole beside it: {len(adapters.sites)} tensors, {numbers:,} numbers ({self.train})")
            if name == "trained" or self.method is None:
                adapters.lr = self.train_lr
            task.add_part("adapters" if name == "default" else name, adapters)

    def on_train_start(self, trainer: pl.Trainer, task: Any) -> None:
        if self.adapters is None:
            return

        # the optimizer's own hook: not at batches that only accumulate, not at steps that a gradient scaler skips, and before the
        # schedule moves the learning rate on
        def coordinate(*_: Any) -> None:
            self.adapters.coordinate(self._clock(trainer, trainer.global_step + 1))  # counted by Lightning when this returns

        self._after_step = trainer.optimizers[0].register_step_post_hook(coordinate)

    # While nothing is trained the effective weights are put in place once, instead of being computed at every call.

    def on_validation_start(self, trainer: pl.Trainer, task: Any) -> None:
        sets = installed(task.backbone.network).values()
        if sets and all(each.method.merge == "exact" for each in sets):
            merge(task.backbone.network)

    def on_validation_end(self, trainer: pl.Trainer, task: Any) -> None:
        if installed(task.backbone.network):
            unmerge(task.backbone.network)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def teardown(self, trainer: pl.Trainer, task: Any, stage: str) -> None:
        self.on_validation_end(trainer, task)  # where an evaluation was cut short
        if self._after_step is not None:
            self._after_step.remove()
            self._after_step = None

    def on_before_optimizer_step(self, trainer: pl.Trainer, task: Any, optimizer: torch.optim.Optimizer) -> None:
        if self.adapters is not None:
            self.adapters.adjust_gradients(self._clock(trainer, trainer.global_step))

    @staticmethod
    def _clock(trainer: pl.Trainer, step: int) -> Clock:
        return Clock(step, int(trainer.estimated_stepping_batches), trainer.current_epoch, trainer.optimizers[0])

    def on_fit_end(self, trainer: pl.Trainer, task: Any) -> None:
        if self.adapters is not None and not trainer.fast_dev_run:
            folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all processes: before the rest leave
            self.export(Path(self.folder) if self.folder else folder / "adapter", trainer, task)

    @rank_zero_only
    def export(self, folder: Path, trainer: pl.Trainer, task: Any) -> None:
        """Write the adapter folder with the task's parts, its facts and the run's metrics."""
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        save_adapter(
            folder,
            task.backbone.network,
            seed=self.seed,
            backbone=task.backbone.describe(),
            resized=task.backbone.resized,
            parts={name: part for name, part in task.parts.items() if not isinstance(part, AdapterSet) and name not in task.scaffold},
            extra={"targets": self.targets, "metrics": metrics, **task.facts()},
            card=self._card(task, metrics),
        )
        size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        rank_zero_info(f"adapter: {folder} ({size:.2f} MiB, {self.adapters.num_trainable():,} trained numbers)")

    def _card(self, task: Any, metrics: dict[str, float]) -> str:
        rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in sorted(metrics.items()))
        backbone = ", ".join(f"{key} {value}" for key, value in task.backbone.describe().items())
        return (
            f"# {type(self.adapters.method).__name__} adapter\n\n"
            f"Backbone: {backbone}.\n\nMethod: `{self.adapters.method!r}` on {len(self.adapters.sites)} sites, "
            f"{self.adapters.num_trainable():,} trained numbers.\n\n| metric | value |\n|---|---|\n{rows}\n\n"
            "Load it with `vision_peft.load_adapter(network, folder, sites=backbone.sites())`, evaluate it with the run's "
            "configuration, export it with `vision-peft export`.\n"
        )

    def _evidence(self, trainer: pl.Trainer, task: Any, sites: list[Any]) -> dict[str, Any]:
        if trainer.datamodule is None:
            raise UserError(f"method {self.method.name} needs a calibration pass over training data: give the run a datamodule")
        device = trainer.strategy.root_device
        task.to(device)
        batches = itertools.islice(iter(trainer.datamodule.train_dataloader()), self.evidence_batches)
        moved = (task.transfer_batch_to_device(batch, device, 0) for batch in batches)
        with torch.random.fork_rng():  # the calibration pass must not shift what training draws
            return collect(task.backbone.network, sites, self.method.evidence, moved, task.loss)
