"""fit, validate, test, predict: LightningCLI over task, data, trainer and adapter, checked before any weight or image is read."""

from __future__ import annotations

import argparse
import logging
import pkgutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vision_peft.commands.config_errors import one_line, users_fault
from vision_peft.commands.config_merge import merge_configs
from vision_peft.engine.callback import AdapterCallback
from vision_peft.engine.checkpoint import AtomicCheckpointIO, LatestCheckpoint
from vision_peft.engine.precision import computable
from vision_peft.errors import UserError
from vision_peft.tasks.base import Task


class RunCLI(LightningCLI):
    """LightningCLI with an `adapter` group and a `run` folder.

    It stops when all is built and checked, so that what a configuration gets wrong is told from what goes wrong in a run.
    """

    adapter: AdapterCallback

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(AdapterCallback, "adapter")
        parser.add_argument("--run", type=str, default="checkpoints/run", help="folder of the run; a number is added if it is taken")
        parser.add_argument("--checkpoint_every", type=int, default=50, help="optimizer steps between checkpoints")

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        if self.subcommand == "fit" and rank_zero_only.rank == 0:  # the other processes follow rank 0's folder
            settings.run = str(_run_folder(Path(settings.run), settings.get("ckpt_path")))

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        self.adapter = self._get(self.config_init, "adapter")
        self.adapter.check(self.model.backbone)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        folder = self._get(self.config, "run")
        trainer = self._get(self.config_init, "trainer")
        kwargs["default_root_dir"] = folder
        kwargs["precision"] = computable(trainer.get("precision"), trainer.get("accelerator"))
        callbacks = _as_list(trainer.get("callbacks"))
        if trainer.get("logger") in (None, True):
            kwargs["logger"] = self._loggers(Path(folder))
        if trainer.get("logger") is not False:
            callbacks.append(LearningRateMonitor("step"))
        if self.subcommand == "fit" and trainer.get("enable_checkpointing") is not False:
            callbacks.append(LatestCheckpoint(self._get(self.config, "checkpoint_every")))
        kwargs["callbacks"] = callbacks
        kwargs["plugins"] = [*_as_list(trainer.get("plugins")), AtomicCheckpointIO()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:  # Lightning's answers to values that it does not know
            raise UserError(f"trainer: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Checkpoints hold no hyper-parameters here, so none is read before the run."""

    def _loggers(self, folder: Path) -> list[CSVLogger | TensorBoardLogger]:
        """Metrics of fit in the run's folder itself, those of the other commands in sub-folders; nothing earlier is overwritten."""
        place = folder if self.subcommand == "fit" else folder / self.subcommand
        earlier = place / "metrics.csv"
        if earlier.exists() and rank_zero_only.rank == 0:
            taken = len(list(earlier.parent.glob("metrics-*.csv")))
            earlier.rename(earlier.with_name(f"metrics-{taken + 1}.csv"))
        return [CSVLogger(place, name="", version=""), TensorBoardLogger(place / "tensorboard", name="", version="")]

    def _run_subcommand(self, subcommand: str) -> None:
        """Left to make_cli()."""


class SaveRunConfig(SaveConfigCallback):
    """The resolved config as config.yaml in the run's folder, so that the folder alone can resume, test and export."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, folder / "config.yaml", skip_unset=False, overwrite=True, multifile=False)


def main(command: str, argv: list[str]) -> None:
    """Run one of Lightning's four subcommands on a configuration."""
    cli = make_cli(command, _expand_resume(argv), run=True)
    if command == "fit" and not cli.trainer.fast_dev_run and cli.trainer.is_global_zero:
        print(f"run folder: {cli.trainer.default_root_dir}")


def make_cli(command: str, argv: list[str], run: bool) -> RunCLI:
    """The parsed, instantiated and checked configuration; with `run` the subcommand is executed as well."""
    _import_catalogue()
    _quieten()
    arguments = [command, *merge_configs(argv)]
    try:
        with hushed("lightning.pytorch", "lightning.fabric"):
            cli = RunCLI(
                Task,
                pl.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=SaveRunConfig,
                seed_everything_default=1,
                trainer_defaults={
                    "log_every_n_steps": 10,
                    "enable_model_summary": False,  # the table of sites says more
                },
                parser_kwargs={"exit_on_error": False},
                auto_configure_optimizers=False,
                args=arguments,
            )
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        if not users_fault(error):
            raise
        raise UserError(one_line(error, argv)) from error
    if run:
        LightningCLI._run_subcommand(cli, command)
    return cli


@contextmanager
def hushed(*names: str) -> Iterator[None]:
    """Without the notices (seed, devices) that would stand before the one line of an error; warnings still come through."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _expand_resume(argv: list[str]) -> list[str]:
    """`--resume RUN` stands for the run's own config and its last checkpoint."""
    if "--resume" not in argv:
        return argv
    place = argv.index("--resume")
    if place + 1 == len(argv):
        raise UserError("--resume: give the run's folder")
    folder = Path(argv[place + 1])
    config, checkpoint = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    for path in (config, checkpoint):
        if not path.is_file():
            raise UserError(f"--resume: {path} does not exist")
    return ["--config", str(config), *argv[:place], *argv[place + 2 :], "--ckpt_path", str(checkpoint)]


def _run_folder(wanted: Path, checkpoint: str | None) -> Path:
    """`wanted`, or wanted-2, wanted-3, ... where a run is there already; a run that resumes keeps its folder."""
    resuming = checkpoint is not None and wanted.resolve() in Path(checkpoint).resolve().parents
    if resuming or not (wanted / "config.yaml").exists():
        return wanted
    number = 2
    while (wanted.parent / f"{wanted.name}-{number}" / "config.yaml").exists():
        number += 1
    return wanted.parent / f"{wanted.name}-{number}"


def _import_catalogue() -> None:
    """Import what a YAML may name by its class alone: methods, tasks, heads, data."""
    for package in ("adapters", "tasks", "data"):
        module = import_module(f"vision_peft.{package}")
        for entry in pkgutil.iter_modules(module.__path__):
            import_module(f"{module.__name__}.{entry.name}")


def _quieten() -> None:
    """Drop library notices that say nothing about the user's run."""
    for text in (
        ".*args parameter is intended to run from within Python.*",
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*LeafSpec.*",
        ".*in eval mode at the start of training.*",  # encoders and generators that tasks hold there
        ".*You have overridden `transfer_batch_to_device`.*",
    ):
        warnings.filterwarnings("ignore", text)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.getMessage())


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
