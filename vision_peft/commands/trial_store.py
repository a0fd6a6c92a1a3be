"""Trials and where they stand: an Optuna study that any number of processes share, each trial named by a key."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import traceback
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from vision_peft.errors import UserError
from vision_peft.processes import alive

SIGNING = 5.0  # seconds within which a worker that has taken a trial has put its name to it, unless it was killed in between
Key = tuple[Any, ...]  # words and numbers, one for each of the store's fields


class TrialStore(ABC):
    """Runs what is wanted and not yet done; a trial that fails is a row of its own, one whose worker died is run again.

    Args:
        storage: Optuna storage URL.
        name: of the study in it.
        plan: text that must be the same for all commands on this store.
        folder: for scratch space and tracebacks.
    """

    fields: ClassVar[tuple[str, ...]]  # what the parts of a key are called in a row
    value: ClassVar[str]  # entry of a trial's result that Optuna shows as its value

    def __init__(self, storage: str, name: str, plan: str, folder: Path) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder = folder
        self.study = _open(storage, name)
        if self.study.user_attrs.get("plan", plan) != plan:
            raise UserError(f"{storage}: holds runs of another configuration: choose another --folder")
        self.study.set_user_attr("plan", plan)

    @abstractmethod
    def size(self) -> int:
        """Trials in all."""

    @abstractmethod
    def wanted(self) -> list[Key]:
        """Keys of the trials that can run now, in order."""

    @abstractmethod
    def belongs(self, key: Key) -> bool:
        """Whether a key that an earlier command may have left is one of this command's."""

    @abstractmethod
    def run(self, key: Key, scratch: Path) -> dict[str, float]:
        """Do the trial; its result, `value` among it. A UserError or any other error makes it a failed one."""

    # ---- where they stand ----

    def trials(self) -> dict[Key, FrozenTrial]:
        """The latest trial of every key."""
        return {_key(trial): trial for trial in self.study.get_trials(deepcopy=False) if trial.state != TrialState.PRUNED}

    def finished(self) -> int:
        ended = (TrialState.COMPLETE, TrialState.FAIL)
        return sum(trial.state in ended and self.belongs(key) for key, trial in self.trials().items())

    def running(self) -> str:
        """What runs now, for people."""
        return ", ".join(" ".join(map(str, key)) for key, trial in self.trials().items() if trial.state == TrialState.RUNNING)

    def rows(self) -> list[dict[str, Any]]:
        """One dict a trial that has ended, in the order of `wanted`: its key's fields, and its result or `error`."""
        kept = {}
        for key, trial in self.trials().items():
            if self.belongs(key) and trial.state in (TrialState.COMPLETE, TrialState.FAIL):
                result = {name: value for name, value in trial.user_attrs.items() if name not in ("worker", "key")}
                kept[key] = {**dict(zip(self.fields, key)), **result}
        return [kept[key] for key in sorted(kept, key=self.place)]

    def place(self, key: Key) -> Any:
        """What rows are sorted by."""
        return key

    # ---- doing it ----

    def reclaim(self, failed_too: bool) -> None:
        """Give up trials whose process on this machine is gone, so that they run again; on request, failed ones as well."""
        if any(trial.state == TrialState.RUNNING and "worker" not in trial.user_attrs for trial in self.trials().values()):
            time.sleep(SIGNING)
        for key, trial in self.trials().items():
            host, _, process = trial.user_attrs.get("worker", "").partition(":")
            gone = not host or (host == socket.gethostname() and not alive(int(process)))
            orphan = trial.state == TrialState.RUNNING and gone
            if orphan:
                self.study.tell(trial.number, state=TrialState.FAIL)
            if orphan or (failed_too and trial.state == TrialState.FAIL):
                self.enqueue(key)

    def enqueue(self, key: Key) -> None:
        self.study.enqueue_trial({}, user_attrs={"key": json.dumps(key)})

    def work(self) -> None:
        """Run trials until none is left that this process could run."""
        while (trial := self._next()) is not None:
            key = _key(trial)
            trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
            scratch = self.folder / "trials" / str(trial.number)
            try:
                found = self.run(key, scratch)
            except UserError as error:
                trial.set_user_attr("error", str(error))
                self.study.tell(trial, state=TrialState.FAIL)
            except Exception as error:  # a method that breaks is a row of the report; the traceback is kept for its author
                trial.set_user_attr("error", f"{type(error).__name__}: {error}")
                (self.folder / f"{'-'.join(map(str, key))}-error.txt").write_text(traceback.format_exc())
                self.study.tell(trial, state=TrialState.FAIL)
            else:
                for name, value in found.items():
                    trial.set_user_attr(name, value)
                self.study.tell(trial, found[self.value])
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _next(self) -> optuna.Trial | None:
        """The next waiting trial, now this process's own."""
        known = self.trials()
        for key in self.wanted():
            if key not in known:
                self.enqueue(key)
        while any(trial.state == TrialState.WAITING for trial in self.study.get_trials(deepcopy=False)):
            trial = self.study.ask()
            if "key" in trial.user_attrs and not self._superfluous(trial):  # without: another process took the last waiting one
                return trial
            self.study.tell(trial, state=TrialState.PRUNED)
        return None

    def _superfluous(self, trial: optuna.Trial) -> bool:
        """Two processes may have enqueued the same; an earlier command may have wanted more."""
        twins = [each for each in self.study.get_trials(deepcopy=False) if each.number < trial.number and _key(each) == _key(trial)]
        return any(twin.state in (TrialState.RUNNING, TrialState.COMPLETE) for twin in twins) or not self.belongs(_key(trial))


def _open(storage: str, name: str) -> optuna.Study:
    """The study in `storage`, made if need be.

    Processes that open a new store at the same moment all try to create its tables; those that come second find them at another try.
    """
    from sqlalchemy.exc import DBAPIError

    given = {"storage": storage, "study_name": name, "direction": "maximize", "load_if_exists": True}
    for _ in range(4):
        try:
            return optuna.create_study(**given)
        except (DBAPIError, optuna.exceptions.StorageInternalError):
            time.sleep(0.5)
    return optuna.create_study(**given)


def _key(trial: FrozenTrial | optuna.Trial) -> Key:
    return tuple(json.loads(trial.user_attrs.get("key", "[]")))
