"""Several YAML files as one: later ones first in rank; a class that a later file or a word names starts from its own defaults.

jsonargparse would hand settings of the earlier class to the later one wherever a name agrees: a LoRA's rank of 8 in the task's file
would silently become the rank of another method, whose author meant something else by it. And of `--model.backbone.weights null`, a
setting of a class in a class, it would make the text 'None'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def merge_configs(argv: list[str]) -> list[str]:
    """`argv` with its `--config FILE` options replaced by one with their content, where there are several or words change it (see above).

    Files that are no readable YAML mapping are left for the parser to complain about.
    """
    rest, files, words = [], [], iter(argv)
    for word in words:
        if word in ("--config", "-c"):
            files.append(next(words, ""))
        elif word.startswith("--config="):
            files.append(word.partition("=")[2])
        else:
            rest.append(word)
    tree: dict[str, Any] = {}
    for file in files:
        try:
            read = yaml.safe_load(Path(file).read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return argv
        if not isinstance(read, dict):
            return argv
        tree = overlaid(tree, read)
    renamed = [_leave_to(word, value, tree) for word, value in _options(rest)]
    nulls = {word for word, value in _options(rest) if value == "null" and _put_null(word, tree)}
    if len(files) < 2 and not any(renamed) and not nulls:
        return argv
    rest = _without(rest, nulls)
    return ["--config", yaml.safe_dump(tree, sort_keys=False), *rest]


def _options(words: list[str]) -> list[tuple[str, str]]:
    """(key, value) of --key=value and --key value."""
    split = [word.partition("=") for word in words]
    followed = zip(split, [*words[1:], ""])
    return [(key[2:], value if equals else after) for (key, equals, value), after in followed if key.startswith("--")]


def _leave_to(key: str, value: str, tree: dict[str, Any]) -> bool:
    """Drop what files say of `key` where the value of a word names another class; whether it did."""
    known: Any = tree
    for part in key.split("."):
        holder = _holder(known, part)
        if holder is None:
            return False
        known = holder[part]
    if not isinstance(known, dict) or not isinstance(known.get("class_path"), str):
        return False
    try:
        told = yaml.safe_load(value)
    except yaml.YAMLError:
        return False
    named = told.get("class_path") if isinstance(told, dict) else told
    if not isinstance(named, str) or named.rpartition(".")[2] == known["class_path"].rpartition(".")[2]:
        return False
    del holder[part]
    return True


def _put_null(key: str, tree: dict[str, Any]) -> bool:
    """Set a setting of a class in the files to null; whether there is such a class."""
    known: Any = tree
    *above, last = key.split(".")
    for part in above:
        holder = _holder(known, part)
        if holder is None:
            return False
        known = holder[part]
    if not isinstance(known, dict) or "class_path" not in known:
        return False
    known["init_args"] = {**(known.get("init_args") or {}), last: None}
    return True


def _without(words: list[str], keys: set[str]) -> list[str]:
    """Words less --key=value and --key value of these keys."""
    kept, given = [], iter(words)
    for word in given:
        key, equals, _ = word.partition("=")
        if not (key.startswith("--") and key[2:] in keys):
            kept.append(word)
        elif not equals:
            next(given)
    return kept


def _holder(tree: Any, key: str) -> dict[str, Any] | None:
    """The mapping with `key`: the tree itself, or, as words leave it out, what its class is made with."""
    if isinstance(tree, dict) and key not in tree:
        tree = tree.get("init_args")
    return tree if isinstance(tree, dict) and key in tree else None


def overlaid(below: Any, above: Any) -> Any:
    """`above` laid over `below`, key by key; a mapping that names another class replaces the one below it whole."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "class_path" in above and above["class_path"] != below.get("class_path", above["class_path"]):
        return above
    return {**below, **{key: overlaid(below.get(key), value) for key, value in above.items()}}
