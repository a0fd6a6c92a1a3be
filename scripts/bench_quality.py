"""Speed of image quality: pictures a second of extraction by expert, and the data pipeline's share of a training step.

OMP_NUM_THREADS=1 python scripts/bench_quality.py

Extraction is timed on biq2021's pictures (512 x 512, decoding included, full and half size), interleaved over the experts, in CPU seconds.
A training step is timed inside `vision-peft fit`, the pipeline in the same process; its share is what workers take off the step.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
from benching import interleave

from vision_peft.allocator import keep_freed_memory
from vision_peft.commands.columns import columns
from vision_peft.commands.run import hushed, make_cli
from vision_peft.data.images import load_rgb
from vision_peft.data.records import Record
from vision_peft.quality.experts import features, open_expert
from vision_peft.quality.opinions import read_opinions

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERTS = ("classical:brisque", "offline:effnet_lite0", "offline:dinov2_vits14", "random:resnet18", "random:resnet50")
AT_ONCE, ROUNDS, STEPS = 8, 3, 8


def extraction(scores: str) -> str:
    paths = [opinion.path for opinion in read_opinions(scores, "--scores")]
    upcoming = itertools.cycle(paths[start : start + AT_ONCE] for start in range(0, AT_ONCE * ROUNDS, AT_ONCE))
    choices = [(name, bf16) for name in EXPERTS for bf16 in (False, True) if not (bf16 and name.startswith("classical"))]
    opened = {f"{name}{', bf16' if bf16 else ''}": open_expert(name, bf16=bf16) for name, bf16 in choices}

    def some(expert) -> None:
        features([expert], [load_rgb(Record(path, -1)) for path in next(upcoming)])

    seconds = interleave({name: partial(some, expert) for name, expert in opened.items()}, ROUNDS)
    rows = [(name, f"{AT_ONCE / statistics.median(each):.1f}") for name, each in seconds.items()]
    return columns([("expert", "img/s"), *rows])


class Clock(pl.Callback):
    """Seconds between the end of a batch and the beginning of the next (data), and inside (step)."""

    def __init__(self) -> None:
        self.data, self.step, self.last = [], [], None

    def on_train_batch_start(self, *args) -> None:
        now = time.perf_counter()
        self.data += [now - self.last] if self.last else []
        self.last = now

    def on_train_batch_end(self, *args) -> None:
        now = time.perf_counter()
        self.step.append(now - self.last)
        self.last = now


def training(config: str, *words: str) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), hushed("lightning.pytorch"):
        quiet = ["--trainer.limit_val_batches", "0", "--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false"]
        more = ["--trainer.callbacks", "null", "--trainer.max_steps", str(STEPS), "--run", f"{folder}/run"]
        cli = make_cli("fit", ["--config", str(CONFIGS / config), *quiet, *more, *words], run=False)
        cli.adapter.export = lambda *args: None
        cli.trainer.callbacks.append(clock := Clock())
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    data, step = statistics.median(clock.data[1:]), statistics.median(clock.step[2:])
    return (f"{data:.2f}", f"{step:.2f}", f"{data / (data + step):.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", default="biq2021/split.csv")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_freed_memory()
    print(extraction(given.scores), flush=True)
    large = ["--model.backbone.name", "resnet50", "--model.queue", "65536", "--trainer.precision", "bf16-mixed"]
    rows = {
        "EfficientNet-Lite0 with LoRA, 4 pictures, crops of 64": training("task/quality_effnet.yaml"),
        "ResNet-18 whole, 4 pictures, crops of 64": training("task/quality_resnet18.yaml"),
        "ResNet-50 whole, 4 pictures, crops of 64, bf16": training("task/quality_resnet18.yaml", *large),
        "  the same with 1 worker": training("task/quality_resnet18.yaml", *large, "--data.num_workers", "1"),
    }
    print(columns([("training", "data, s", "step, s", "data's share"), *((name, *row) for name, row in rows.items())]))


if __name__ == "__main__":
    main()
