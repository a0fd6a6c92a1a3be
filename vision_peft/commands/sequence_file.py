"""The YAML file that lists a sequence of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vision_peft.commands.plan_files import read_tree
from vision_peft.errors import UserError, nearest

KEYS = ("name", "source", "template", "shots")


@dataclass(frozen=True)
class SequenceTask:
    """One entry of `tasks:`.

    Attributes:
        name: a word, for folders and tables.
        source: class_path and init_args of the set.
        template: of the prompts, with {} for the class name.
        shots: training pictures a class; None leaves the task configuration's.
    """

    name: str
    source: dict[str, Any]
    template: str
    shots: int | None = None

    def settings(self) -> dict[str, Any]:
        """As overrides of a run's configuration, by dotted key."""
        found: dict[str, Any] = {"data.init_args.source": self.source, "data.init_args.template": self.template}
        return found if self.shots is None else {**found, "data.init_args.shots": self.shots}


def read_sequence(path: str) -> list[SequenceTask]:
    """The tasks of a file, in its order; UserError for anything that is not as SequenceTask says."""
    tree = read_tree(path)
    entries = tree.get("tasks")
    if set(tree) != {"tasks"} or not isinstance(entries, list) or len(entries) < 2:
        raise UserError(f"{path}: a sequence is one key `tasks` with a list of at least 2 entries")
    tasks = [_task(f"{path}: tasks[{place}]", entry) for place, entry in enumerate(entries)]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two tasks are called {name!r}")
    return tasks


def _task(where: str, entry: Any) -> SequenceTask:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not a mapping with {', '.join(KEYS)}")
    for key in entry:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), KEYS)}")
    for key in KEYS[:3]:
        if key not in entry:
            raise UserError(f"{where}: {key} is missing")
    name, source, template, shots = (entry.get(key) for key in KEYS)
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise UserError(f"{where}.name: {name!r} is not a word of letters, digits, _ and -")
    if not isinstance(source, dict) or "class_path" not in source:
        raise UserError(f"{where}.source: give class_path and init_args")
    if not isinstance(template, str) or template.count("{}") != 1:
        raise UserError(f"{where}.template: {template!r} must contain {{}} once, for the class name")
    if shots is not None and (not isinstance(shots, int) or shots < 1):
        raise UserError(f"{where}.shots: {shots!r} is not a number of pictures, at least 1")
    return SequenceTask(name, source, template, shots)
