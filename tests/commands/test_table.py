"""table: which cells, in which order, with which settings; killed and resumed; what the tables and figures say."""

from __future__ import annotations

import csv
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from optuna.trial import TrialState
from tiny_settings import tiny_settings

from vision_peft.cli import main
from vision_peft.commands.table_study import Grid, TableStudy
from vision_peft.errors import UserError
from vision_peft.report.fewshot_table import AVERAGE, mean_and_spread, write_table


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """The task, two sets (one is the other with other pictures for prompts' sake) and three methods."""
    trees = {
        "task": tiny_settings(),
        "plain": {"data": {"init_args": {"source": {"class_path": "Digits"}}}},
        "worded": {"data": {"init_args": {"source": {"class_path": "Digits"}, "template": "the digit {}."}}},
        "lora": {"adapter": {"method": {"class_path": "LoRA", "init_args": {"rank": 2}}}},
        "probe": {"adapter": {"method": None}, "trainer": {"max_steps": 0}},
        "broken": {"adapter": {"method": {"class_path": "LoRA", "init_args": {"rank": 500}}}},
    }
    del trees["task"]["trainer"]["max_steps"]
    for name, tree in trees.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return {name: str(tmp_path / f"{name}.yaml") for name in trees}


def grid(files: dict[str, str], methods=("lora", "probe"), shots=(1, 2), seeds=(1,), **options) -> Grid:
    given = {"steps_per_shot": 2, "settings": [], "report": "test/accuracy", **options}
    sets = [files["plain"], files["worded"]]
    return Grid.of([files["task"]], sets, [files[name] for name in methods], list(shots), list(seeds), **given)


def store(files: dict[str, str], folder: Path, **options) -> TableStudy:
    return TableStudy(grid(files, **options), f"sqlite:///{folder / 'study.db'}", folder)


def test_cells_get_their_shots_and_steps(files, tmp_path):
    ours = store(files, tmp_path, methods=("lora", "probe", "broken"), seeds=(3,))
    ours.work()
    rows = ours.rows()
    assert [(row["shots"], row["set"], row["method"]) for row in rows] == [
        (shots, name, method) for shots in (1, 2) for name in ("plain", "worded") for method in ("lora", "probe", "broken")
    ]
    for row in rows:
        if row["method"] == "broken":
            assert "rank: 500 does not fit" in row["error"]
        else:
            assert 0 <= row["test/accuracy"] <= 1
            assert bool(row["trainable"]) == (row["method"] == "lora")
    text = write_table(rows, tmp_path, "test/accuracy", ours.size())
    assert "8 of 12 runs have ended well" in text
    assert "Failed: broken on plain, 1 shot, seed 3: adapter.method.rank: 500 does not fit" in text
    for shots in (1, 2):  # the same run by `fit` and `test` gives the same figure
        run = tmp_path / f"lora{shots}"
        words = ["--config", files["task"], "--config", files["plain"], "--config", files["lora"], "--trainer.max_steps", str(2 * shots)]
        words += ["--data.shots", str(shots), "--data.seed", "3", "--seed_everything", "3", "--run", str(run)]
        assert main(["fit", *words]) == 0
        assert main(["test", *words, "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
        [found] = csv.DictReader((run / "test" / "metrics.csv").open())
        row = next(row for row in rows if (row["shots"], row["set"], row["method"]) == (shots, "plain", "lora"))
        assert float(found["test/accuracy"]) == pytest.approx(row["test/accuracy"])


def test_killed_and_started_again_with_more_seeds(files, tmp_path):
    folder = tmp_path / "out"
    words = ["--config", files["task"], "--sets", files["plain"], files["worded"], "--methods", files["lora"], "--shots", "1", "2"]
    words += ["--steps_per_shot", "2", "--seeds", "1", "--folder", str(folder)]
    worker = subprocess.Popen(
        [sys.executable, "-m", "vision_peft.cli", "table", *words, "--worker"], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    watch = None
    while worker.poll() is None:
        if watch is None and (folder / "study.db").is_file():
            watch = store(files, folder, methods=("lora",))
        if watch is not None and watch.finished() >= 1 and watch.running():
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        time.sleep(0.05)
    done = [trial.number for trial in watch.study.get_trials() if trial.state == TrialState.COMPLETE]
    assert 1 <= len(done) < 4
    assert main(["table", *words]) == 0
    assert [watch.study.get_trials()[number].state for number in done] == [TrialState.COMPLETE] * len(done)
    assert sum(trial.state == TrialState.COMPLETE for trial in watch.study.get_trials()) == 4  # nothing is done twice
    words[words.index("--seeds") + 1 : words.index("--seeds") + 2] = ["1", "2"]
    assert main(["table", *words]) == 0
    rows = list(csv.DictReader((folder / "rows.csv").open()))
    assert len(rows) == 8 and (folder / "accuracy.png").stat().st_size > 10_000
    assert sum(trial.state == TrialState.COMPLETE for trial in watch.study.get_trials()) == 8
    text = (folder / "table.md").read_text()
    for shots in ("1", "2"):
        own = [100 * float(row["test/accuracy"]) for row in rows if row["shots"] == shots and row["set"] == "plain"]
        assert f"| **{statistics.mean(own):.1f} ± {statistics.stdev(own):.1f}** |" in text


def test_averages_are_over_seeds_that_have_every_set():
    cells = [("a", 1, 0.2), ("a", 2, 0.4), ("b", 1, 0.6), ("b", 2, 0.6), ("a", 3, 1.0)]
    rows = [{"set": name, "shots": 4, "method": "m", "seed": seed, "t": value} for name, seed, value in cells]
    found = mean_and_spread(rows, "t")
    assert found[4, "m", "a"] == (pytest.approx(1.6 / 3), pytest.approx(0.4163, abs=1e-4), 3)
    assert found[4, "m", AVERAGE] == (pytest.approx(0.45), pytest.approx(0.0707, abs=1e-4), 2)  # 0.4 and 0.5; seed 3 lacks b


def test_retention_has_tables_of_its_own(tmp_path):
    common = {"set": "a", "shots": 1, "method": "m", "seed": 1}
    rows = [{**common, "test/accuracy": 0.5, "retention/before": 0.4, "retention/after": 0.3}]
    text = write_table(rows, tmp_path, "test/accuracy", 1)
    assert "retention/after, percent, 1 shot" in text and "| m | **30.0** |" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shots": (0,)}, "--shots: 0 is not"),
        ({"seeds": ()}, "--seeds: nothing"),
        ({"steps_per_shot": 0, "shots": ()}, "--shots: nothing"),
        ({"settings": ["a"]}, "--set: 'a' is not KEY=VALUE"),
    ],
)
def test_bad_grids(files, change, message):
    with pytest.raises(UserError, match=message):
        grid(files, **change)


def test_bad_files(files, tmp_path):
    (tmp_path / "bad.yaml").write_text("data: [")
    (tmp_path / "list.yaml").write_text("- a")
    for path, message in (("bad.yaml", "bad.yaml: while parsing"), ("list.yaml", "not a mapping"), ("absent.yaml", "no such file")):
        with pytest.raises(UserError, match=message) as error:
            Grid.of([files["task"]], [str(tmp_path / path)], [files["lora"]], [1], [1], None, [], "test/accuracy")
        assert "\n" not in str(error.value)


def test_a_folder_of_another_table_is_refused(files, tmp_path):
    store(files, tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        store(files, tmp_path, steps_per_shot=3)
