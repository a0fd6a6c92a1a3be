"""A sequence of tasks: each a run of fit on the merged weights of the one before, all of it resumable at any point.

    FOLDER/sequence.json     what is done: accuracies before training, and a row a task; written whole after each task
    FOLDER/tasks/02_dtd/     the run of a task, with its adapter folder; 02_dtd.yaml beside it is what it overrides
    FOLDER/merged/02.safetensors    the model after the latest task; earlier ones are removed
    FOLDER/table.md, matrix.csv, matrix.png, ranks.png
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tqdm.auto import tqdm

from vision_peft.commands.networks import find_folders, rebuild
from vision_peft.commands.plan_files import read_tree
from vision_peft.commands.run import RunCLI, hushed, make_cli
from vision_peft.commands.sequence_file import read_sequence
from vision_peft.commands.trial import nested
from vision_peft.engine.merged import save_merged
from vision_peft.engine.store import CONFIG, load_adapter
from vision_peft.errors import UserError
from vision_peft.report import sequence as report
from vision_peft.tasks.continual_classification import ContinualClassification
from vision_peft.tasks.sequence_evaluation import Accuracies, evaluate

WEIGHTS_KEY, SEEN_KEY, SEED_KEY = "model.init_args.backbone.init_args.weights", "model.init_args.seen_classes", "adapter.seed"
QUIET = {"trainer.logger": False, "trainer.callbacks": None, "adapter.method": None}
KINDS = Accuracies._fields


class SequenceRun:
    """What go() needs to know.

    Args:
        words: options of fit, `--config` among them.
        file: the sequence's YAML file.
        folder: where everything goes.
    """

    def __init__(self, words: list[str], file: str, folder: Path) -> None:
        self.words, self.folder, self.tasks = words, folder, read_sequence(file)
        self.state_file = folder / "sequence.json"
        self.state = self._read_state(_digest(words, file))
        self.sets: dict[str, Any] = {}  # by task, the data modules that give test pictures, class names and prompts
        self.base: dict[str, torch.Tensor] = {}  # the weights before any training

    def go(self) -> None:
        """Whatever is still to be done.

        Raises:
            UserError: a configuration that does not fit a sequence, before anything is written.
        """
        for task in self.tasks:
            self.sets[task.name] = self._quiet_cli(task.settings()).datamodule
        seen = [len(data.class_names) for data in self.sets.values()]
        with tempfile.TemporaryDirectory() as scratch:
            first = self._cli("fit", Path(scratch) / "run", self._settings(0, 0), run=False)
        self._check(first)
        seed = first.adapter.seed
        print(f"{len(self.tasks)} tasks, {sum(seen)} classes; {self.folder}")
        if not self.state["zero_shot"]:
            self.state["zero_shot"] = self._evaluate(None)
            self._write_state()
        for number in range(len(self.state["rows"]), len(self.tasks)):
            task = self.tasks[number]
            print(f"task {number + 1} of {len(self.tasks)}: {task.name}")
            self._fit(number, {**self._settings(number, sum(seen[:number])), SEED_KEY: seed + number})
            facts = self._merge(number)
            self.state["rows"].append({"task": task.name, **self._evaluate(self._merged(number)), **facts})
            self._write_state()
            for earlier in self._merged(number).parent.glob("*.safetensors"):
                if earlier != self._merged(number):
                    earlier.unlink()
            self._report()
        print(self._report())

    # ---- one task ----

    def _settings(self, number: int, seen: int) -> dict[str, Any]:
        """Overrides of a task's run, by dotted key."""
        weights = {WEIGHTS_KEY: str(self._merged(number - 1))} if number else {}
        return {**self.tasks[number].settings(), **weights, SEEN_KEY: seen}

    def _fit(self, number: int, settings: dict[str, Any]) -> None:
        folder = self._task(number)
        if (folder / "adapter" / CONFIG).is_file():
            return
        last = folder / "checkpoints" / "last.ckpt"
        if not last.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its first checkpoint
        self._cli("fit", folder, settings, run=True, more=["--ckpt_path", str(last)] if last.is_file() else [])
        gc.collect()  # a run leaves reference cycles that hold its network

    @torch.no_grad()
    def _merge(self, number: int) -> dict[str, Any]:
        """Write the model after a task; returns what its update was: ranks by site (of methods that have one), numbers and norms."""
        adapter, config = find_folders(self._task(number))
        backbone = rebuild(adapter, config)
        backbone.load()
        adapters = load_adapter(backbone.network, adapter, sites=backbone.sites(), resized=backbone.resized)
        adapters.eval()
        ranks, update = {}, 0.0
        for site, each in zip(adapters.sites, adapters.adapters.values()):
            W = site.matrix(backbone.network.get_parameter(site.path)).float()
            update += float((each.weight(W) - W).square().sum())
            form = each.compact().factored(W) if site.role == "weight" else None
            if form is not None:
                ranks[site.name] = form.B.shape[1]
        save_merged(self._merged(number), backbone.network)
        merged, base = load_file(self._merged(number)), self._base()
        drift = sum(float((merged[site.path] - base[site.path]).square().sum()) for site in {s.path: s for s in adapters.sites}.values())
        return {"ranks": ranks, "trained": adapters.num_trainable(), "update": update**0.5, "drift": drift**0.5}

    def _evaluate(self, weights: Path | None) -> dict[str, list[float]]:
        cli = self._quiet_cli({WEIGHTS_KEY: str(weights)} if weights else {})
        backbone, trainer = cli.model.backbone, cli.trainer
        backbone.load()
        with tqdm(self.sets, "testing on all sets", dynamic_ncols=True) as bar:

            def progress(name: str) -> None:
                bar.set_postfix_str(name)
                bar.update()

            found = evaluate(backbone, self.sets, trainer.strategy.root_device, trainer.precision_plugin.forward_context, progress)
        return {kind: [round(value, 6) for value in values] for kind, values in zip(KINDS, found)}

    def _base(self) -> dict[str, torch.Tensor]:
        if not self.base:
            backbone = self._quiet_cli({}).model.backbone
            backbone.load()
            self.base = dict(backbone.network.state_dict())
        return self.base

    # ---- configurations ----

    def _cli(self, command: str, folder: Path, settings: dict[str, Any], run: bool, more: list[str] | None = None) -> RunCLI:
        overrides = folder.parent / f"{folder.name}.yaml"
        overrides.parent.mkdir(parents=True, exist_ok=True)
        overrides.write_text(yaml.safe_dump(nested(settings)))
        return make_cli(command, [*self.words, "--config", str(overrides), "--run", str(folder), *(more or [])], run=run)

    def _quiet_cli(self, settings: dict[str, Any]) -> RunCLI:
        """Built and checked, with nothing to train and nowhere to log."""
        with tempfile.TemporaryDirectory() as scratch, hushed("lightning.pytorch", "lightning.fabric"):
            return self._cli("test", Path(scratch) / "run", {**QUIET, **settings}, run=False)

    @staticmethod
    def _check(cli: RunCLI) -> None:
        if not isinstance(cli.model, ContinualClassification):
            raise UserError(f"model: a sequence is trained by ContinualClassification, not {type(cli.model).__name__}")
        if cli.adapter.method is None:
            raise UserError("adapter.method: a sequence needs a method whose update is merged after each task")
        if cli.adapter.method.merge == "impossible":
            raise UserError(f"adapter.method: {cli.adapter.method.name} cannot be merged, which a sequence does after each task")
        if cli.trainer.world_size > 1:
            raise UserError("trainer.devices: a sequence runs in one process; set it to 1")

    def _task(self, number: int) -> Path:
        return self.folder / "tasks" / f"{number + 1:02d}_{self.tasks[number].name}"

    def _merged(self, number: int) -> Path:
        return self.folder / "merged" / f"{number + 1:02d}.safetensors"

    # ---- state and report ----

    def _read_state(self, plan: str) -> dict[str, Any]:
        if not self.state_file.is_file():
            return {"plan": plan, "tasks": [task.name for task in self.tasks], "zero_shot": {}, "rows": []}
        try:
            state = json.loads(self.state_file.read_text())
        except ValueError as error:
            raise UserError(f"{self.state_file}: damaged ({error})") from error
        if state.get("plan") != plan:
            raise UserError(f"{self.folder}: holds a sequence of other tasks or another configuration: choose another --run")
        return state

    def _write_state(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = self.state_file.with_suffix(".partial")
        staging.write_text(json.dumps(self.state, indent=1))
        os.replace(staging, self.state_file)

    def _report(self) -> str:
        """Write tables and pictures of what is done; returns the tables as text."""
        names, rows, zero_shot = [task.name for task in self.tasks], self.state["rows"], self.state["zero_shot"]
        matrices = {kind: [row[kind] for row in rows] for kind in KINDS}
        titles = {"known": "own classes (task known)", "union": "classes of all tasks"}
        parts = [report.text_table(names, zero_shot[kind], matrices[kind], titles[kind]) for kind in KINDS]
        lines = ["| task | trained | mean rank | norm of the update | drift from the start |", "| --- | ---: | ---: | ---: | ---: |"]
        for row in rows:
            ranks = f"{sum(row['ranks'].values()) / len(row['ranks']):.1f}" if row["ranks"] else "-"
            lines.append(f"| {row['task']} | {row['trained']:,} | {ranks} | {row['update']:.2f} | {row['drift']:.2f} |")
        text = "\n\n".join([*parts, "\n".join(lines)]) + "\n"
        (self.folder / "table.md").write_text(text)
        report.write_csv(self.folder / "matrix.csv", names, zero_shot, matrices)
        report.plot_matrix(self.folder / "matrix.png", names, zero_shot, matrices)
        if all(row["ranks"] for row in rows):
            report.plot_ranks(self.folder / "ranks.png", [row["task"] for row in rows], [row["ranks"] for row in rows])
        else:
            text += "\nNo picture of ranks: the updates of this method have none.\n"
        return text


def _digest(words: list[str], file: str) -> str:
    """Of the tasks, the contents of the configuration files and the other options."""
    content: list[Any] = [read_tree(file)]
    for before, word in zip(["", *words], words):
        named = word if before == "--config" else word.removeprefix("--config=") if word.startswith("--config=") else None
        content.append(word if named is None else read_tree(named))
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
