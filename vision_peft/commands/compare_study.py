"""The trials of a comparison and where they stand: an Optuna study that any number of processes share."""

from __future__ import annotations

import os
import shutil
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from vision_peft.commands.compare_trial import run_trial
from vision_peft.errors import UserError

STUDY = "compare"
LR_KEY = "model.init_args.optimizer.init_args.lr"
SEED_KEYS = ("seed_everything", "data.init_args.seed")
SIGNING = 5.0  # seconds within which a worker that has taken a trial has put its name to it, unless it was killed in between
Key = tuple[str, str, float, int]  # phase, method, learning rate, seed


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        words: `--config` options of the task.
        methods: name -> YAML file.
        rates: name -> learning rates, ascending.
        seeds: the first one chooses the rates.
        settings: further overrides by dotted key.
        score: metric of the val split.
    """

    words: tuple[str, ...]
    methods: dict[str, str]
    rates: dict[str, list[float]]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    score: str

    @classmethod
    def of(
        cls, configs: list[str], methods: list[str], rates: list[float] | None, factors: list[float], seeds: list[int],
        settings: list[str], score: str,
    ) -> Plan:  # fmt: skip
        files = {Path(path).stem: path for path in methods}
        if len(files) < len(methods):
            raise UserError("--methods: two files have the same name")
        trees = [_read(path) for path in configs]
        if not seeds or not (rates or factors):
            raise UserError("--seeds and --lrs (or --lr_factors) must not be empty")
        chosen = {}
        for name, path in files.items():
            base = [rate for tree in (*trees, _read(path)) if (rate := _at(tree, LR_KEY)) is not None]
            if not base and not rates:
                raise UserError(f"{path}: no {LR_KEY} in it or in the task's configuration to multiply: give --lrs")
            chosen[name] = sorted(rates or {float(f"{float(base[-1]) * factor:.6g}") for factor in factors})
        words = tuple(word for path in configs for word in ("--config", path))
        given = dict(_setting(text) for text in settings)
        return cls(words, files, chosen, tuple(seeds), given, score)


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    return yaml.safe_load(Path(path).read_text()) or {}


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set: {text!r} is not KEY=VALUE")
    return key, yaml.safe_load(value)


def _open(storage: str) -> optuna.Study:
    """The study in `storage`, made if need be.

    Processes that open a new store at the same moment all try to create its tables; those that come second find them at another try.
    """
    from sqlalchemy.exc import DBAPIError

    given = {"storage": storage, "study_name": STUDY, "direction": "maximize", "load_if_exists": True}
    for _ in range(4):
        try:
            return optuna.create_study(**given)
        except (DBAPIError, optuna.exceptions.StorageInternalError):
            time.sleep(0.5)
    return optuna.create_study(**given)


class Study:
    """Trials are (phase, method, lr, seed): `choose` at every rate with the first seed, `report` at the chosen rate with every seed."""

    def __init__(self, plan: Plan, storage: str, folder: Path) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.plan, self.folder = plan, folder
        self.study = _open(storage)
        everything = repr((plan.words, sorted(plan.settings.items()), plan.score))
        before = self.study.user_attrs.setdefault("plan", everything)
        if before != everything:
            raise UserError(f"{storage}: holds a comparison of another configuration: choose another --folder")
        self.study.set_user_attr("plan", everything)

    # ---- what there is to do ----

    def size(self) -> int:
        """Trials in all, once every rate is chosen."""
        return sum(len(rates) for rates in self.plan.rates.values()) + len(self.plan.methods) * len(self.plan.seeds)

    def finished(self) -> int:
        return sum(trial.state in (TrialState.COMPLETE, TrialState.FAIL) for trial in self._trials().values())

    def running(self) -> str:
        return ", ".join(key[1] for key, trial in self._trials().items() if trial.state == TrialState.RUNNING)

    def chosen(self) -> dict[str, float]:
        """Method -> rate with the best val score (the smaller of equals), for methods of which every rate has ended."""
        found = {}
        for name, rates in self.plan.rates.items():
            trials = [self._trials().get(("choose", name, rate, self.plan.seeds[0])) for rate in rates]
            if all(trial is not None and trial.state in (TrialState.COMPLETE, TrialState.FAIL) for trial in trials):
                scores = [(trial.value, -rate) for rate, trial in zip(rates, trials) if trial.state == TrialState.COMPLETE]
                if scores:
                    found[name] = -max(scores)[1]
        return found

    def _wanted(self) -> list[Key]:
        """Keys of the trials that can run now, in order."""
        choosing = [("choose", name, rate, self.plan.seeds[0]) for name, rates in self.plan.rates.items() for rate in rates]
        return choosing + [("report", name, rate, seed) for name, rate in self.chosen().items() for seed in self.plan.seeds]

    def _trials(self) -> dict[Key, FrozenTrial]:
        """The latest trial of every key."""
        return {_key(trial): trial for trial in self.study.get_trials(deepcopy=False) if trial.state != TrialState.PRUNED}

    def reclaim(self, failed_too: bool) -> None:
        """Give up trials whose process on this machine is gone, so that they run again; on request, failed ones as well."""
        if any(trial.state == TrialState.RUNNING and "worker" not in trial.user_attrs for trial in self._trials().values()):
            time.sleep(SIGNING)
        for trial in self._trials().values():
            host, _, process = trial.user_attrs.get("worker", "").partition(":")
            gone = not host or (host == socket.gethostname() and not _alive(int(process)))
            orphan = trial.state == TrialState.RUNNING and gone
            if orphan:
                self.study.tell(trial.number, state=TrialState.FAIL)
            if orphan or (failed_too and trial.state == TrialState.FAIL):
                self._enqueue(_key(trial))

    def _enqueue(self, key: Key) -> None:
        phase, name, rate, seed = key
        self.study.enqueue_trial({"lr": rate, "seed": seed}, user_attrs={"phase": phase, "method": name})

    # ---- doing it ----

    def work(self) -> None:
        """Run trials until none is left that this process could run."""
        while (trial := self._next()) is not None:
            phase, name, rate, seed = _key(trial)
            trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
            scratch = self.folder / "trials" / str(trial.number)
            settings = {**self.plan.settings, LR_KEY: rate, **{key: seed for key in SEED_KEYS}}
            words = [*self.plan.words, "--config", self.plan.methods[name]]
            try:
                found = run_trial(words, settings, scratch, self.plan.score, test=phase == "report")
            except UserError as error:
                trial.set_user_attr("error", str(error))
                self.study.tell(trial, state=TrialState.FAIL)
            except Exception as error:  # a method that breaks is a row of the report; the traceback is kept for its author
                trial.set_user_attr("error", f"{type(error).__name__}: {error}")
                (self.folder / f"{name}-error.txt").write_text(traceback.format_exc())
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                for key, value in found.items():
                    trial.set_user_attr(key, value)
                self.study.tell(trial, found["val"])
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _next(self) -> optuna.Trial | None:
        """The next waiting trial, now this process's own."""
        known = self._trials()
        for key in self._wanted():
            if key not in known:
                self._enqueue(key)
        while any(trial.state == TrialState.WAITING for trial in self.study.get_trials(deepcopy=False)):
            trial = self.study.ask()
            if "method" in trial.user_attrs:  # else another process took the last waiting one in between
                trial.suggest_float("lr", 1e-12, 1e3, log=True)  # both are given; this records them
                trial.suggest_int("seed", 0, 2**31 - 1)
                if not self._superfluous(trial):
                    return trial
            self.study.tell(trial, state=TrialState.PRUNED)
        return None

    def _superfluous(self, trial: optuna.Trial) -> bool:
        """Two processes may have enqueued the same; an earlier command may have compared more methods."""
        twins = [each for each in self.study.get_trials(deepcopy=False) if each.number < trial.number and _key(each) == _key(trial)]
        taken = any(twin.state in (TrialState.RUNNING, TrialState.COMPLETE) for twin in twins)
        return taken or trial.user_attrs["method"] not in self.plan.methods

    # ---- what came out ----

    def rows(self) -> list[dict[str, Any]]:
        """One dict a trial that has ended: phase, method, lr, seed, val, test metrics, trainable, seconds, mib; or error."""
        kept = []
        for (phase, name, rate, seed), trial in self._trials().items():
            if name in self.plan.methods and trial.state in (TrialState.COMPLETE, TrialState.FAIL):
                attributes = {key: value for key, value in trial.user_attrs.items() if key != "worker"}
                kept.append({"phase": phase, "method": name, "lr": rate, "seed": seed, **attributes})
        order = {name: place for place, name in enumerate(self.plan.methods)}
        return sorted(kept, key=lambda row: (order[row["method"]], row["phase"], row["lr"], row["seed"]))


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks only
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _key(trial: FrozenTrial | optuna.Trial) -> Key:
    given = trial.params or trial.system_attrs["fixed_params"]
    return trial.user_attrs.get("phase", ""), trial.user_attrs.get("method", ""), given.get("lr", 0.0), given.get("seed", 0)
