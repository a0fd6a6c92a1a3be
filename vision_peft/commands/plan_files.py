"""YAML files and KEY=VALUE settings that a command of many runs is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vision_peft.errors import UserError


def by_stem(option: str, paths: Sequence[str]) -> dict[str, str]:
    """{file name without suffix: path}; UserError where a file is missing or two have the same name."""
    files = {Path(path).stem: path for path in paths}
    if len(files) < len(paths):
        raise UserError(f"{option}: two files have the same name")
    for path in paths:
        read_tree(path)
    return files


def read_tree(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        tree = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a mapping of settings")
    return tree


def value_at(tree: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def setting(text: str) -> tuple[str, Any]:
    """("a.b", 1) of "a.b=1"."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set: {text!r} is not KEY=VALUE")
    return key, yaml.safe_load(value)
