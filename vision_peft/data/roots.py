"""Where data lives: relative paths start at the folder named by VISION_PEFT_DATA (`datasets/` when it is not set)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vision_peft.errors import UserError, nearest

VARIABLE = "VISION_PEFT_DATA"


def data_root() -> Path:
    """The folder that relative data paths start at; read from the environment at every call."""
    return Path(os.environ.get(VARIABLE, "datasets")).expanduser()


def existing(path: str, key: str) -> Path:
    """`path` under data_root() (an absolute path is taken as it is).

    Args:
        key: the config key the path came from, for the message.

    Raises:
        UserError: nothing is there; names the path, how it was resolved and siblings with a similar name.
    """
    found = data_root() / Path(path).expanduser()
    if not found.exists():
        siblings = [entry.name for entry in found.parent.iterdir()] if found.parent.is_dir() else []
        raise UserError(f"{key}: {found} does not exist{_relative_to(path)}{nearest(found.name, siblings)}")
    return found


def first_existing(spellings: Sequence[str], key: str) -> Path:
    """The first of several spellings of a folder that exists under data_root(): the same set is unpacked under different names.

    Raises:
        UserError: none exists; names all of them.
    """
    for name in spellings:
        if (data_root() / name).is_dir():
            return data_root() / name
    raise UserError(f"{key}: no folder {' or '.join(spellings)} in {data_root()} (set {VARIABLE}, or give the folder)")


def _relative_to(path: str) -> str:
    return "" if Path(path).expanduser().is_absolute() else f" (relative paths start at {VARIABLE} = {data_root()})"
