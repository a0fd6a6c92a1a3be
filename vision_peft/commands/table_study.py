"""What a table runs: sets x shots x methods x seeds at the settings of their files, nothing chosen by a score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_peft.commands.compare_study import SEED_KEYS
from vision_peft.commands.plan_files import by_stem, read_tree, setting, value_at
from vision_peft.commands.trial import run_trial
from vision_peft.commands.trial_store import Key, TrialStore
from vision_peft.errors import UserError

SHOTS_KEY, STEPS_KEY = "data.init_args.shots", "trainer.max_steps"


@dataclass(frozen=True)
class Grid:
    """The cells of a table.

    Attributes:
        words: `--config` options of the task.
        sets, methods: name -> YAML file, in the order of the table.
        shots, seeds: ascending, and as given.
        steps_per_shot: optimizer steps are this times the shots, but for methods whose file sets trainer.max_steps; None leaves them.
        settings: further overrides by dotted key.
        report: metric of the test split.
    """

    words: tuple[str, ...]
    sets: dict[str, str]
    methods: dict[str, str]
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    steps_per_shot: int | None
    settings: dict[str, Any]
    report: str

    @classmethod
    def of(
        cls, configs: list[str], sets: list[str], methods: list[str], shots: list[int], seeds: list[int], steps_per_shot: int | None,
        settings: list[str], report: str,
    ) -> Grid:  # fmt: skip
        for path in configs:
            read_tree(path)
        for option, values in (("--shots", shots), ("--seeds", seeds), ("--steps_per_shot", [steps_per_shot or 1])):
            if not values or min(values) < (0 if option == "--seeds" else 1):
                raise UserError(f"{option}: {' '.join(map(str, values)) or 'nothing'} is not a number of them, which starts at 1")
        words = tuple(word for path in configs for word in ("--config", path))
        given = dict(setting(text) for text in settings)
        files = by_stem("--sets", sets), by_stem("--methods", methods)
        return cls(words, *files, tuple(sorted(set(shots))), tuple(dict.fromkeys(seeds)), steps_per_shot, given, report)


class TableStudy(TrialStore):
    """Trials are (set, shots, method, seed); the first seed of all comes first, so that half a table says something."""

    fields = ("set", "shots", "method", "seed")

    def __init__(self, grid: Grid, storage: str, folder: Path) -> None:
        self.grid, self.value = grid, grid.report
        same = (grid.words, grid.steps_per_shot, sorted(grid.settings.items()), grid.report)
        super().__init__(storage, "table", repr(same), folder)

    def size(self) -> int:
        return len(self.wanted())

    def wanted(self) -> list[Key]:
        grid = self.grid
        return [(name, shots, method, seed) for seed in grid.seeds for shots in grid.shots for name in grid.sets for method in grid.methods]

    def belongs(self, key: Key) -> bool:
        name, shots, method, seed = key
        return name in self.grid.sets and shots in self.grid.shots and method in self.grid.methods and seed in self.grid.seeds

    def place(self, key: Key) -> Any:
        name, shots, method, seed = key
        return shots, list(self.grid.sets).index(name), list(self.grid.methods).index(method), seed

    def run(self, key: Key, scratch: Path) -> dict[str, float]:
        name, shots, method, seed = key
        settings = {**self.grid.settings, SHOTS_KEY: shots, **{each: seed for each in SEED_KEYS}}
        if self.grid.steps_per_shot and value_at(read_tree(self.grid.methods[method]), STEPS_KEY) is None:
            settings[STEPS_KEY] = self.grid.steps_per_shot * shots
        words = [*self.grid.words, "--config", self.grid.sets[name], "--config", self.grid.methods[method]]
        found = run_trial(words, settings, scratch, None, test=True, callbacks=True)
        if self.grid.report not in found:
            raise UserError(f"--report: the task logs no {self.grid.report!r}; it logs {', '.join(sorted(found))}")
        return found
