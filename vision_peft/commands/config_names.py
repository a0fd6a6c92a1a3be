"""What a configuration may say and where it says it: keys of its groups, arguments of its classes, classes that fit a place, its files."""

from __future__ import annotations

import difflib
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

GROUPS = {  # keys that are a class's arguments in YAML, without class_path
    "adapter": "vision_peft.engine.callback.AdapterCallback",
    "trainer": "lightning.pytorch.Trainer",
}
CHOICES = {"model": "vision_peft.tasks.base.Task", "data": "lightning.pytorch.LightningDataModule"}  # keys that choose a class
PLAIN = ("config", "run", "seed_everything", "ckpt_path")


def close(word: str, known: Iterable[str]) -> str:
    """`"; did you mean a, b?"`, or an empty string: like errors.nearest, but blind to case and to what stands before the last dot."""
    word = word.rpartition(".")[2].lower()
    scores = {name: _likeness(word, name.rpartition(".")[2].lower()) for name in known}
    best = max(scores.values(), default=0)
    found = [name for name in sorted(scores, key=scores.get, reverse=True) if scores[name] >= max(0.6, best - 0.15, best == 1)]
    return f"; did you mean {', '.join(found[:3])}?" if found else ""


def _likeness(word: str, name: str) -> float:
    begins = len(word) > 1 and name.startswith(word)
    return max(0.7 if begins else 0.0, difflib.SequenceMatcher(None, word, name).ratio())


def find_class(path: str) -> type | None:
    """The class of a dotted path, or of a short name that some imported class bears; None if there is none."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None) if module else None
    except Exception:  # whatever a user's path runs into when it is imported was reported by the parser
        return None
    return found if isinstance(found, type) else None


def options(cls: type) -> list[str]:
    """Names of the arguments of a class, those that **kwargs hands up included."""
    names: dict[str, None] = {}
    for each in cls.__mro__:
        if "__init__" in vars(each) and each is not object:
            parameters = list(inspect.signature(each.__init__).parameters.values())[1:]
            names |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return [name for name in names if name[0] != "_" and name != "params"]  # an optimizer's params come from the task


def keys() -> list[str]:
    """The keys that may stand at the top of a YAML, and those one level below in dotted form."""
    below = [f"{key}.{name}" for key, path in {**GROUPS, **CHOICES}.items() for name in options(find_class(path))]
    return [*CHOICES, *GROUPS, *PLAIN, *below]


def wanted(path: Sequence[str], owner: type | None) -> type | None:
    """The base class of what belongs at a dotted path; `owner` is the class that has the last key as an argument, if it is known."""
    if owner is None and len(path) == 1:
        return find_class(CHOICES.get(path[0], ""))
    if owner is None and len(path) == 2:
        owner = find_class(GROUPS.get(path[0], ""))
    return _base(_hints(owner).get(path[-1])) if owner is not None else None


def fitting(base: type, given: str = "") -> list[str]:
    """Names by which a YAML can choose a class of that kind: lazy ones of its package, those in `given`'s module, all imported ones."""
    module = sys.modules.get(given.rpartition(".")[0])
    near = [f"{module.__name__}.{name}" for name, value in vars(module).items() if _fits(value, base)] if module else []
    imported = sorted(each.__name__ for each in _subclasses(base) if _fits(each, base))
    package = sys.modules.get(base.__module__.rpartition(".")[0])
    lazy = [f"{package.__name__}.{name}" for name in getattr(package, "__all__", ()) if hasattr(package, "__getattr__")]
    ends = {name.rpartition(".")[2] for name in [*lazy, *near]}
    return [*lazy, *near, *(name for name in imported if name not in ends)]


def _fits(value: Any, base: type) -> bool:
    kin = isinstance(value, type) and issubclass(value, base) and value is not base
    return kin and not inspect.isabstract(value) and not value.__name__.startswith("_")


def _subclasses(base: type) -> set[type]:
    direct = set(base.__subclasses__())
    return direct.union(*(_subclasses(each) for each in direct))


def _hints(owner: type) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for each in reversed(owner.__mro__):
        try:
            hints |= typing.get_type_hints(vars(each)["__init__"]) if "__init__" in vars(each) else {}
        except Exception:  # a library's annotations need not resolve
            continue
    return hints


def _base(hint: Any) -> type | None:
    """The class that an annotation is about: of `Method | None`, `list[Callback]`, `Callable[..., Optimizer]`."""
    if isinstance(hint, type) and not typing.get_args(hint):
        return None if hint.__module__ in ("builtins", "types") else hint
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Callable:
        arguments = arguments[-1:]
    return next((found for each in arguments if (found := _base(each)) is not None), None)


def configs(argv: list[str]) -> list[str]:
    following = [argv[place + 1] for place, word in enumerate(argv[:-1]) if word in ("--config", "-c")]
    return following + [word.partition("=")[2] for word in argv if word.startswith("--config=")]


def place(path: list[str], argv: list[str]) -> str:
    """`FILE: ` if the last word on this key is in a YAML file, an empty string if it is on the command line."""
    given = [word[2:].partition("=")[0].split(".") for word in argv if word.startswith("--")]
    if any(option == path[: len(option)] for option in given):
        return ""
    for name in reversed(configs(argv)):
        try:
            node = yaml.safe_load(Path(name).read_text())
            for part in path:
                node = node[part] if part in node else node["init_args"][part]
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            continue
        return f"{name}: "
    return ""
