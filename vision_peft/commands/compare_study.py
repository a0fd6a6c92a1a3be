"""What a comparison runs: every rate with the first seed, then each method's best rate with every seed; one rate alone needs no choice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from vision_peft.commands.plan_files import by_stem, read_tree, setting, value_at
from vision_peft.commands.trial import run_trial
from vision_peft.commands.trial_store import Key, TrialStore
from vision_peft.errors import UserError

LR_KEY = "model.init_args.optimizer.init_args.lr"
SEED_KEYS = ("seed_everything", "data.init_args.seed")


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
        files = by_stem("--methods", methods)
        trees = [read_tree(path) for path in configs]
        if not seeds or not (rates or factors):
            raise UserError("--seeds and --lrs (or --lr_factors) must not be empty")
        chosen = {}
        for name, path in files.items():
            base = [rate for tree in (*trees, read_tree(path)) if (rate := value_at(tree, LR_KEY)) is not None]
            if not base and not rates:
                raise UserError(f"{path}: no {LR_KEY} in it or in the task's configuration to multiply: give --lrs")
            chosen[name] = sorted(rates or {float(f"{float(base[-1]) * factor:.6g}") for factor in factors})
        words = tuple(word for path in configs for word in ("--config", path))
        return cls(words, files, chosen, tuple(seeds), dict(setting(text) for text in settings), score)


class Study(TrialStore):
    """Trials are (phase, method, lr, seed): `choose` at every rate with the first seed, `report` at the chosen rate with every seed."""

    fields = ("phase", "method", "lr", "seed")
    value = "val"

    def __init__(self, plan: Plan, storage: str, folder: Path) -> None:
        self.plan = plan
        super().__init__(storage, "compare", repr((plan.words, sorted(plan.settings.items()), plan.score)), folder)

    def size(self) -> int:
        """Trials in all, once every rate is chosen."""
        choices = sum(len(rates) for rates in self.plan.rates.values() if len(rates) > 1)
        return choices + len(self.plan.methods) * len(self.plan.seeds)

    def wanted(self) -> list[Key]:
        several = {name: rates for name, rates in self.plan.rates.items() if len(rates) > 1}
        choosing = [("choose", name, rate, self.plan.seeds[0]) for name, rates in several.items() for rate in rates]
        return choosing + [("report", name, rate, seed) for name, rate in self.chosen().items() for seed in self.plan.seeds]

    def chosen(self) -> dict[str, float]:
        """Method -> rate with the best val score (the smaller of equals), for methods of which every rate has ended."""
        found, known = {}, self.trials()
        for name, rates in self.plan.rates.items():
            if len(rates) == 1:
                found[name] = rates[0]
                continue
            trials = [known.get(("choose", name, rate, self.plan.seeds[0])) for rate in rates]
            if all(trial is not None and trial.state in (TrialState.COMPLETE, TrialState.FAIL) for trial in trials):
                scores = [(trial.value, -rate) for rate, trial in zip(rates, trials) if trial.state == TrialState.COMPLETE]
                if scores:
                    found[name] = -max(scores)[1]
        return found

    def belongs(self, key: Key) -> bool:
        return key[2] in self.plan.rates.get(key[1], ()) and key[3] in self.plan.seeds

    def place(self, key: Key) -> Any:
        phase, name, rate, seed = key
        return list(self.plan.methods).index(name), phase, rate, seed

    def run(self, key: Key, scratch: Path) -> dict[str, float]:
        phase, name, rate, seed = key
        settings = {**self.plan.settings, LR_KEY: rate, **{each: seed for each in SEED_KEYS}}
        words = [*self.plan.words, "--config", self.plan.methods[name]]
        return run_trial(words, settings, scratch, self.plan.score, test=phase == "report")
