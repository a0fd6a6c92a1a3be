"""Errors that are the user's to mend: one clear line, exit code 2 on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input (config, image, split file, checkpoint, adapter folder). The message is one line that names file and key."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """`"; did you mean a, b?"` with the closest of the `known` words, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
