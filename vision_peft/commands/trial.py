"""One trial of many: a run of `fit` in this process, then its score on the val split and on the test split, as asked."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from vision_peft.allocator import return_freed_memory
from vision_peft.commands.run import hushed, make_cli
from vision_peft.engine.adapter_set import AdapterSet
from vision_peft.errors import UserError

# what a trial writes is its row: no loggers, checkpoints or adapter folders
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}


def run_trial(
    words: list[str], overrides: dict[str, Any], folder: Path, score: str | None, test: bool, callbacks: bool = False
) -> dict[str, float]:
    """Train by the configuration of `words` under `overrides` (dotted key -> value) and score.

    Args:
        words: `--config FILE ...` and other options of fit.
        folder: scratch space of the trial.
        score: metric of the val split, such as `val/accuracy`; None: that split is not run.
        test: also run the test split; its metrics are returned under their own names (`test/accuracy`).
        callbacks: keep the configuration's, whose `retention/...` metrics are returned as well; they may write into `folder`.

    Returns:
        val (with a score), every test metric, trainable (numbers in the adapters), seconds (of training), mib (peak memory over the
        start's).
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "overrides.yaml"
    quiet = {**QUIET, **({} if callbacks else {"callbacks": []})}
    last.write_text(yaml.safe_dump(nested({**{f"trainer.{key}": value for key, value in quiet.items()}, **overrides})))
    _reset_peak()
    with contextlib.redirect_stdout(io.StringIO()), hushed("lightning.pytorch", "lightning.fabric"):
        cli = make_cli("fit", [*words, "--config", str(last), "--run", str(folder)], run=False)
        cli.adapter.export = lambda *args: None
        start = time.perf_counter()
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        seconds = time.perf_counter() - start
        found = {key: float(value) for key, value in cli.trainer.callback_metrics.items() if key.startswith("retention/")}
        if score is not None:
            cli.trainer.limit_val_batches = 1.0
            valued = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)[0]
            if score not in valued:
                raise UserError(f"--score: the task logs no {score!r}; it logs {', '.join(sorted(valued))}")
            found["val"] = float(valued[score])
        if test:
            found |= cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)[0]
    result = {key: float(value) for key, value in found.items()}
    result["trainable"] = float(sum(part.num_trainable() for part in cli.model.parts.values() if isinstance(part, AdapterSet)))
    result |= {"seconds": seconds, "mib": _peak()}
    del cli
    gc.collect()
    return result


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


_start_kib = 0.0


def _reset_peak() -> None:
    global _start_kib
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        return_freed_memory()  # or this trial would use what earlier ones freed, without any rise
        Path("/proc/self/clear_refs").write_text("5")
        _start_kib = _resident_kib("VmRSS")


def _peak() -> float:
    """MiB; nan where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return (_resident_kib("VmHWM") - _start_kib) / 1024 if os.access("/proc/self/clear_refs", os.W_OK) else float("nan")


def _resident_kib(field: str) -> float:
    return next(float(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
