"""A configuration error as one line: the key, the value, what was expected and the nearest match."""

from __future__ import annotations


def one_line(message: str, argv: list[str]) -> str:
    return message
