"""compare: what is run, in which order, chosen by what; killed and resumed; failures are rows; the report is one file."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from optuna.trial import TrialState
from tiny_settings import tiny_settings

from vision_peft.cli import main
from vision_peft.commands.compare_study import Plan, Study
from vision_peft.errors import UserError
from vision_peft.report.comparison import summarize, write_comparison

METHODS = {"lora": {"class_path": "LoRA", "init_args": {"rank": 2}}, "bitfit": {"class_path": "BitFit"}, "none": None}


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """The task's configuration, with a val split, and a file a method."""
    settings = tiny_settings()
    del settings["trainer"]["limit_val_batches"]
    settings["data"]["init_args"]["shots"] = 2
    found = {}
    for name, tree in {"task": settings, **{name: {"adapter": {"method": method}} for name, method in METHODS.items()}}.items():
        found[name] = str(tmp_path / f"{name}.yaml")
        Path(found[name]).write_text(yaml.safe_dump(tree))
    return found


def plan(files: dict[str, str], *methods: str, rates=(0.001, 0.01), seeds=(1, 2)) -> Plan:
    chosen = [files[name] for name in methods]
    return Plan.of([files["task"]], chosen, list(rates), [], list(seeds), ["trainer.max_steps=1"], "val/accuracy")


def study(files: dict[str, str], folder: Path, *methods: str, **options) -> Study:
    return Study(plan(files, *methods, **options), f"sqlite:///{folder / 'study.db'}", folder)


def test_every_rate_with_the_first_seed_then_the_best_with_every_seed(files, tmp_path):
    ours = study(files, tmp_path, "lora", "none")
    ours.work()
    rows = ours.rows()
    assert [(row["method"], row["lr"], row["seed"]) for row in rows if row["phase"] == "choose"] == [
        ("lora", 0.001, 1), ("lora", 0.01, 1), ("none", 0.001, 1), ("none", 0.01, 1)
    ]  # fmt: skip
    for name in ("lora", "none"):
        tried = {row["lr"]: row["val"] for row in rows if row["phase"] == "choose" and row["method"] == name}
        final = [row for row in rows if row["phase"] == "report" and row["method"] == name]
        best = 0.001 if tried[0.001] >= tried[0.01] else 0.01  # the smaller of equals
        assert [(row["lr"], row["seed"]) for row in final] == [(best, 1), (best, 2)]
        assert all(0 <= row["test/accuracy"] <= 1 and row["seconds"] > 0 for row in final)
        assert not any("test/accuracy" in row for row in rows if row["phase"] == "choose")  # the test split is not looked at
        again = next(row for row in final if row["seed"] == 1)
        assert again["val"] == tried[best]  # the same run twice gives the same score
    assert {row["method"]: row["trainable"] for row in rows} == {"lora": 6 * 2 * 2 * (64 + 64), "none": 0}
    assert ours.size() == ours.finished() == 8
    assert not list((tmp_path / "trials").iterdir())


def test_a_method_that_breaks_is_a_row_and_the_others_go_on(files, tmp_path):
    Path(files["bitfit"]).write_text(yaml.safe_dump({"adapter": {"method": {"class_path": "LoRA", "init_args": {"rank": 500}}}}))
    ours = study(files, tmp_path, "bitfit", "none", rates=[0.001], seeds=[1])  # one rate: nothing to choose
    ours.work()
    rows = {(row["method"], row["phase"]): row for row in ours.rows()}
    assert "rank: 500 does not fit" in rows["bitfit", "report"]["error"]
    assert "val" in rows["none", "report"]
    text = write_comparison(list(rows.values()), tmp_path, "val/accuracy", "test/accuracy")
    assert "failed: bitfit at 0.001, seed 1: adapter.method.rank: 500 does not fit" in text
    Path(files["bitfit"]).write_text(yaml.safe_dump({"adapter": {"method": {"class_path": "BitFit"}}}))
    ours.reclaim(failed_too=True)
    ours.work()
    assert [row for row in ours.rows() if row["method"] == "bitfit" and "test/accuracy" in row]


def test_another_worker_takes_only_what_is_left(files, tmp_path):
    first = study(files, tmp_path, "none", rates=[0.001], seeds=[1])
    first.enqueue(("choose", "none", 0.001, 1))
    first.enqueue(("choose", "none", 0.001, 1))  # as two processes might at the same moment
    first.work()
    second = study(files, tmp_path, "none", rates=[0.001], seeds=[1])
    second.work()
    states = [trial.state for trial in second.study.get_trials()]
    assert states.count(TrialState.COMPLETE) == 2 and states.count(TrialState.PRUNED) == 1


def test_a_trial_whose_worker_died_before_it_could_sign_is_run_again(files, tmp_path):
    ours = study(files, tmp_path, "none", rates=[0.001], seeds=[1])
    ours.enqueue(("choose", "none", 0.001, 1))
    ours.study.ask()
    ours.reclaim(failed_too=False)
    ours.work()
    assert [row["phase"] for row in ours.rows()] == ["choose", "report"] and not any("error" in row for row in ours.rows())


def test_killed_and_started_again(files, tmp_path):
    folder = tmp_path / "out"
    words = ["--config", files["task"], "--methods", files["none"], files["lora"], "--lrs", "0.001", "0.01", "--seeds", "1"]
    words += ["--folder", str(folder)]
    worker = subprocess.Popen(
        [sys.executable, "-m", "vision_peft.cli", "compare", *words, "--worker"], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    watch = None
    while worker.poll() is None:
        if watch is None and (folder / "study.db").is_file():
            watch = Study(Plan.of([files["task"]], [files["none"], files["lora"]], [0.001, 0.01], [], [1], [], "val/accuracy"),
                          f"sqlite:///{folder / 'study.db'}", folder)  # fmt: skip
        if watch is not None and watch.finished() >= 1 and watch.running():
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        time.sleep(0.05)
    assert 1 <= watch.finished() < 6
    done = [trial.number for trial in watch.study.get_trials() if trial.state == TrialState.COMPLETE]
    assert main(["compare", *words]) == 0
    rows = watch.rows()
    assert len(rows) == 6 and not [row for row in rows if "error" in row]
    assert all(watch.study.get_trials()[number].state == TrialState.COMPLETE for number in done)
    assert sum(trial.state == TrialState.COMPLETE for trial in watch.study.get_trials()) == 6  # nothing that was done is done again
    html = (folder / "report.html").read_text()
    assert "data:image/png;base64," in html and "http" not in html.replace("http-equiv", "")
    assert len(list(csv.DictReader((folder / "table.csv").open()))) == 2


def test_factors_multiply_the_rate_of_the_method_or_else_of_the_task(files):
    own = yaml.safe_load(Path(files["lora"]).read_text()) | {"model": {"init_args": {"optimizer": {"init_args": {"lr": 0.2}}}}}
    Path(files["lora"]).write_text(yaml.safe_dump(own))
    given = Plan.of([files["task"]], [files["lora"], files["none"]], None, [3.0, 0.5], [1], [], "val/accuracy")
    assert given.rates == {"lora": [0.1, 0.6], "none": [0.025, 0.15]}


def test_summary_has_best_median_and_worst_over_the_rates_and_the_spread_over_seeds():
    common = {"method": "m", "trainable": 7.0, "seconds": 1.0, "mib": 1.0}
    rows = [{**common, "phase": "choose", "lr": lr, "seed": 1, "val": val} for lr, val in ((1, 0.5), (2, 0.7), (3, 0.2))]
    rows += [{**common, "phase": "report", "lr": 2, "seed": seed, "val": 0.7, "t": t} for seed, t in ((1, 0.6), (2, 0.8))]
    [found] = summarize(rows, "t")
    assert (found["val_best"], found["val_median"], found["val_worst"], found["lr"]) == (0.7, 0.5, 0.2, 2)
    assert found["test"] == pytest.approx(0.7) and found["spread"] == pytest.approx(0.1414, abs=1e-4) and found["trained"] == 7


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": ["missing.yaml"]}, "missing.yaml: no such file"),
        ({"settings": ["trainer.max_steps"]}, "--set: 'trainer.max_steps' is not KEY=VALUE"),
        ({"seeds": []}, "--seeds and --lrs"),
        ({"methods": ["a/x.yaml", "b/x.yaml"]}, "two files have the same name"),
    ],
)
def test_bad_plans(files, change, message):
    given = {"configs": [files["task"]], "methods": [files["lora"]], "rates": [0.1], "factors": [], "seeds": [1], "settings": []} | change
    with pytest.raises(UserError, match=message):
        Plan.of(**given, score="val/accuracy")


def test_a_folder_of_another_comparison_is_refused(files, tmp_path):
    study(files, tmp_path, "none")
    other = Plan.of([files["task"]], [files["none"]], [0.1], [], [1], ["trainer.max_steps=7"], "val/accuracy")
    with pytest.raises(UserError, match="another configuration"):
        Study(other, f"sqlite:///{tmp_path / 'study.db'}", tmp_path)


def test_an_unknown_score(files, tmp_path):
    wrong = Plan.of([files["task"]], [files["none"]], [0.1], [], [1], [], "val/dice")
    ours = Study(wrong, f"sqlite:///{tmp_path / 'study.db'}", tmp_path)
    ours.work()
    assert "the task logs no 'val/dice'; it logs val/accuracy" in ours.rows()[0]["error"]
