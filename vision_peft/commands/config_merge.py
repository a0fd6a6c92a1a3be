"""Several YAML files as one: later ones first in rank, and a class that a later file names starts from its own defaults.

jsonargparse would hand settings of the earlier class to the later one wherever a name agrees: a LoRA's rank of 8 in the task's file
would silently become the rank of another method, whose author meant something else by it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def merge_configs(argv: list[str]) -> list[str]:
    """`argv` with its `--config FILE` options, where there are several, replaced by one with their content.

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
    if len(files) < 2:
        return argv
    tree: dict[str, Any] = {}
    for file in files:
        try:
            read = yaml.safe_load(Path(file).read_text())
        except (OSError, ValueError, yaml.YAMLError):
            return argv
        if not isinstance(read, dict):
            return argv
        tree = overlaid(tree, read)
    return ["--config", yaml.safe_dump(tree, sort_keys=False), *rest]


def overlaid(below: Any, above: Any) -> Any:
    """`above` laid over `below`, key by key; a mapping that names another class replaces the one below it whole."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "class_path" in above and above["class_path"] != below.get("class_path", above["class_path"]):
        return above
    return {**below, **{key: overlaid(below.get(key), value) for key, value in above.items()}}
