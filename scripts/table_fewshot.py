"""The few-shot table of docs/results_fewshot.md: sets x backbones x shots x seeds x methods, one row a run, resumable.

    OMP_NUM_THREADS=1 VISION_PEFT_DATA=... python scripts/table_fewshot.py --select     # every learning rate, 16 shots, seed 1
    OMP_NUM_THREADS=1 VISION_PEFT_DATA=... python scripts/table_fewshot.py              # every run at the chosen rates
    OMP_NUM_THREADS=1 VISION_PEFT_DATA=... python scripts/table_fewshot.py --longer     # LoRA on the ViT, 16 shots, four times the steps
    python scripts/table_fewshot.py --write                                             # docs/results_fewshot.md from the rows

Rows are appended to docs/rows/results_fewshot.csv (--select: docs/rows/results_fewshot_rates.csv) as runs end; a run whose row is there is
skipped. What is chosen is chosen by val accuracy: the strength of the linear probe in every run, by LinearHead itself; the learning rate
of a method once a backbone, by the mean over the sets at 16 shots, seed 1. Test accuracies of --select are not computed.
The layers below the first adapted one are cached, over a fixed number of augmented views.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch

from vision_peft.backbones import Vit
from vision_peft.data.csv_source import CsvSource
from vision_peft.data.dataset import ImageDataset
from vision_peft.data.fewshot_images import FewShotImages
from vision_peft.engine.adapter import find_method
from vision_peft.engine.callback import AdapterCallback
from vision_peft.tasks.cache import HiddenStates
from vision_peft.tasks.fewshot_classification import FewShotClassification
from vision_peft.tasks.heads import LinearHead

ROWS = Path("docs/rows/results_fewshot.csv")
LONGER_ROWS = Path("docs/rows/results_fewshot_longer.csv")
RATE_ROWS = Path("docs/rows/results_fewshot_rates.csv")
PAGE = Path("docs/results_fewshot.md")
SETS = ("dtd10", "caltech101")
SHOTS = (4, 16)
SEEDS = (1, 2, 3)
VIEWS = 4
TARGETS = {"offline:dinov2_vits14": ["vision.{5..8}.*"], "offline:effnet_lite0": ["vision.blocks.{5..6}.*", "vision.conv_head"]}
RATES = {
    "linear_probe": (0.0,),  # logistic regression, solved and not stepped
    "lora": (3e-4, 1e-3, 3e-3),
    "dora": (3e-4, 1e-3, 3e-3),
    "comp_lora": (3e-4, 1e-3, 3e-3),
    "block_lora": (3e-4, 1e-3, 3e-3),
    "svfit": (1e-3, 3e-3, 1e-2),
    "bitfit": (3e-4, 1e-3, 3e-3),
    "full": (3e-5, 1e-4, 3e-4),
}
LONGER = 4  # times the steps
STEPS = {("dtd10", 4): 30, ("dtd10", 16): 60, ("caltech101", 4): 60, ("caltech101", 16): 100}
# one scale, rank and dropout for the whole family, so that the rows differ in the method alone
OPTIONS = {name: {"rank": 8, "alpha": 8.0, "scaling": "rank", "dropout": 0.0} for name in ("lora", "dora", "comp_lora", "block_lora")}
FIELDS = ["set", "backbone", "shots", "seed", "method", "lr", "steps", "trainable", "val", "test", "seconds"]


@dataclass(frozen=True)
class Run:
    set: str
    backbone: str
    shots: int
    seed: int
    method: str
    lr: float
    longer: int = 1

    def key(self) -> tuple[str, ...]:
        return (self.set, self.backbone, str(self.shots), str(self.seed), self.method, f"{self.lr:g}")


def execute(run: Run, testing: bool) -> dict[str, object]:
    """Train, validate on the whole val split, test; the same objects that the YAML of configs/task/fewshot_vit.yaml names."""
    pl.seed_everything(run.seed)
    method = None if run.method == "linear_probe" else find_method(run.method)(**OPTIONS.get(run.method, {}))
    views = None if method is None else VIEWS  # the probe takes no step: nothing to cache
    shown = {"augment": "clip_lora", "min_scale": 0.35, "views": views}
    data = FewShotImages(CsvSource(f"{run.set}/split.csv"), shots=run.shots, seed=run.seed, full_val=True, **shown)
    task = FewShotClassification(
        Vit(run.backbone),
        LinearHead("linear_probe"),
        optimizer=lambda params: torch.optim.AdamW(params, lr=run.lr, weight_decay=0.01),
        head_lr=None if method is None else 1e-3,
        cache="disk",
        warmup_steps=10,
    )
    adapters = AdapterCallback(method, TARGETS[run.backbone])
    trainer = pl.Trainer(
        max_steps=0 if method is None else run.longer * STEPS[run.set, run.shots],
        precision="bf16-mixed",
        accelerator="cpu",
        callbacks=[adapters],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    adapters.export = lambda *args: None  # no adapter folder for a row of a table
    start = time.process_time()  # of this process: what else the machine does does not count
    trainer.fit(task, datamodule=data)
    seconds = time.process_time() - start
    trained = sum(p.numel() for part in task.parts.values() for p in part.parameters() if p.requires_grad)
    val = accuracy(task, data.val_dataset, trainer)
    found = {"steps": trainer.global_step, "trainable": trained, "val": f"{val:.4f}", "seconds": f"{seconds:.1f}"}
    if testing:
        data.setup("test")
        found["test"] = f"{accuracy(task, data.test_dataset, trainer):.4f}"
    return found


@torch.no_grad()
def accuracy(task: FewShotClassification, pictures: ImageDataset, trainer: pl.Trainer) -> float:
    """Top-1; what lies below the adapted layers comes from the disk cache that all methods of a set share."""
    task.eval()
    block = task.backbone.first_block(set(task.backbone.adapted))
    states = HiddenStates(pictures, task.backbone, block, task.device, trainer.precision_plugin, True, str(task.frozen_fingerprint))
    right = 0
    with trainer.precision_plugin.forward_context():
        for hidden, labels in torch.utils.data.DataLoader(states, batch_size=64):
            right += int((task.head(task.backbone.suffix(hidden, block)).argmax(1) == labels).sum())
    return right / len(states)


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open())) if path.is_file() else []


def chosen_rates() -> dict[tuple[str, str], float]:
    """(backbone, method) -> the rate with the best mean val accuracy over the sets; the smaller one of equals."""
    found: dict[tuple[str, str, float], dict[str, float]] = {}
    for row in rows(RATE_ROWS):
        found.setdefault((row["backbone"], row["method"], float(row["lr"])), {})[row["set"]] = float(row["val"])
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for (backbone, method, lr), values in found.items():
        if set(values) == set(SETS):
            best[backbone, method] = max(best.get((backbone, method), (-1.0, 0.0)), (sum(values.values()), -lr))
    return {key: -value[1] for key, value in best.items()}


def selection() -> Iterator[Run]:
    for backbone, (method, rates), name in itertools.product(TARGETS, RATES.items(), SETS):
        for lr in rates:
            yield Run(name, backbone, 16, 1, method, lr)


def table_runs() -> Iterator[Run]:
    rates = chosen_rates()
    for shots, seed, name, backbone, method in itertools.product(reversed(SHOTS), SEEDS, SETS, TARGETS, RATES):
        if (backbone, method) in rates:
            yield Run(name, backbone, shots, seed, method, rates[backbone, method])


def longer_runs() -> Iterator[Run]:
    """What the short runs leave open: whether LoRA is behind because it is LoRA, or because it has been stopped early."""
    for seed, name, lr in itertools.product(SEEDS, SETS, RATES["lora"][:2]):
        yield Run(name, "offline:dinov2_vits14", 16, seed, "lora", lr, LONGER)


def run_all(runs: list[Run], path: Path, testing: bool) -> None:
    done = {tuple(row[field] for field in FIELDS[:6]) for row in rows(path)}
    waiting = [run for run in runs if run.key() not in done]
    for number, run in enumerate(waiting, 1):
        result = execute(run, testing)
        fresh = not path.is_file()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS if testing else [field for field in FIELDS if field != "test"])
            if fresh:
                writer.writeheader()
            writer.writerow(dict(zip(FIELDS, run.key())) | result)
        outcome = ", ".join(f"{name} {result[name]}" for name in ("val", "test", "seconds") if name in result)
        print(f"{number}/{len(waiting)} {' '.join(run.key())}: {outcome}", flush=True)


def write_page() -> None:
    """docs/results_fewshot.md: test accuracy (mean and spread over seeds), trainable numbers, seconds."""
    head = Path(__file__).with_name("results_fewshot_head.md").read_text()
    text = head.format(machine=f"{platform.machine()}, one thread, torch {torch.__version__}", date=time.strftime("%Y-%m-%d"))
    text += _tables(rows(ROWS)) + _longer(rows(LONGER_ROWS))
    PAGE.write_text(text)


def _tables(found: list[dict[str, str]]) -> str:
    """One table a backbone and set."""
    groups: dict[tuple[str, str, int, str], list[dict[str, str]]] = {}
    for row in found:
        groups.setdefault((row["backbone"], row["set"], int(row["shots"]), row["method"]), []).append(row)
    text = ""
    for backbone, name in itertools.product(TARGETS, SETS):
        text += f"\n### {backbone}, {name}\n\n| method | learning rate | trainable | 4 shots | 16 shots | CPU seconds at 16 shots |\n"
        text += "|---|---|---|---|---|---|\n"
        for method in RATES:
            cells = [groups.get((backbone, name, shots, method), []) for shots in SHOTS]
            if any(cells):
                some = next(cell for cell in cells if cell)[0]
                seconds = f"{statistics.mean(float(row['seconds']) for row in cells[1]):.0f}" if cells[1] else ""
                columns = (method, some["lr"], f"{int(some['trainable']):,}", _spread(cells[0]), _spread(cells[1]), seconds)
                text += f"| {' | '.join(columns)} |\n"
    return text


def _longer(found: list[dict[str, str]]) -> str:
    """LoRA's rows with more steps, beside the probe's."""
    text = f"\n## LoRA on the ViT, 16 shots, {LONGER} times the steps\n\n"
    text += "| set | learning rate | steps | val | test |\n|---|---|---|---|---|\n"
    for name, lr in itertools.product(SETS, sorted({row["lr"] for row in found}, key=float)):
        cell = [row for row in found if (row["set"], row["lr"]) == (name, lr)]
        if cell:
            val = statistics.mean(100 * float(row["val"]) for row in cell)
            text += f"| {name} | {lr} | {cell[0]['steps']} | {val:.1f} | {_spread(cell)} |\n"
    return text


def _spread(cell: list[dict[str, str]]) -> str:
    values = [100 * float(row["test"]) for row in cell]
    if not values:
        return "not run"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--select", action="store_true", help="choose learning rates")
    parser.add_argument("--longer", action="store_true", help="the longer runs of LoRA")
    parser.add_argument("--write", action="store_true", help="write the page from the rows")
    parser.add_argument("--only", nargs="*", default=[], help="keep runs whose key holds all of these words")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if args.write:
        write_page()
        return
    runs, path = (selection(), RATE_ROWS) if args.select else (longer_runs(), LONGER_ROWS) if args.longer else (table_runs(), ROWS)
    run_all([run for run in runs if all(word in run.key() for word in args.only)], path, not args.select)



if __name__ == "__main__":
    main()
