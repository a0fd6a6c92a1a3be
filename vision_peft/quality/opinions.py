"""Opinion scores listed in a CSV file, and how a set of them is divided."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vision_peft.data.roots import existing
from vision_peft.errors import UserError, nearest

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Opinion:
    """A picture and what people think of it.

    Attributes:
        score: mean opinion, in the set's own unit; higher is better.
        std: of the observers' scores, where it is known.
        reference: what several distorted pictures are made from; pictures of one reference stay in one part.
        split: the file's own, where it has one.
    """

    path: Path
    score: float
    std: float | None = None
    reference: str | None = None
    split: str | None = None


def read_opinions(file: str, key: str = "scores", lower_is_better: bool = False) -> list[Opinion]:
    """Rows of a CSV file with the columns `path` and `mos`, and `std`, `reference`, `split` where the set has them; others are ignored.

    Paths are relative to the CSV's folder; a relative `file` starts at VISION_PEFT_DATA.

    Args:
        lower_is_better: the column holds difference scores (DMOS): they are negated.

    Raises:
        UserError: names the file, the line and what is wrong.
    """
    path = existing(file, key)
    if not path.is_file():
        raise UserError(f"{key}: {path} is a folder; name the CSV file in it")
    found: list[Opinion] = []
    seen: set[Path] = set()
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        there = reader.fieldnames or []
        for column in ("path", "mos"):
            if column not in there:
                raise UserError(f"{path}: no column {column!r} (columns: {', '.join(there)}){nearest(column, there)}")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            given = {name: (value or "").strip() for name, value in row.items() if name is not None and not isinstance(value, list)}
            picture = path.parent / given["path"]
            if not given["path"] or not picture.is_file():
                raise UserError(f"{where}: path {given['path'] or 'is missing'}{' does not exist' if given['path'] else ''}")
            if picture in seen:
                raise UserError(f"{where}: {given['path']} is listed twice")
            if given.get("split") and given["split"] not in SPLITS:
                raise UserError(f"{where}: unknown split {given['split']!r}, expected train, val or test{nearest(given['split'], SPLITS)}")
            seen.add(picture)
            score = _number(given["mos"], f"{where}: mos")
            std = _number(given["std"], f"{where}: std") if given.get("std") else None
            score = -score if lower_is_better else score
            found.append(Opinion(picture, score, std, given.get("reference") or None, given.get("split") or None))
    if len(found) < 3:
        raise UserError(f"{path}: holds {len(found)} scores; at least 3 are needed")
    return found


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{where} is {text!r}, not a number" if text else f"{where} is missing") from None
    if not math.isfinite(value):
        raise UserError(f"{where} is {text}, not a finite number")
    return value


def divide(opinions: Sequence[Opinion], shares: tuple[float, float, float], seed: int) -> tuple[list[int], list[int], list[int]]:
    """Indices of train, val and test, drawn by `seed`; references, where they are known, are drawn whole.

    Args:
        shares: of the pictures (or references), summing to 1.
    """
    groups: dict[str, list[int]] = {}
    for index, opinion in enumerate(opinions):
        groups.setdefault(f"={index}" if opinion.reference is None else opinion.reference, []).append(index)
    names = list(groups)
    random.Random(f"quality/{seed}").shuffle(names)
    first, second = round(shares[0] * len(names)), round((shares[0] + shares[1]) * len(names))
    parts = (names[:first], names[first:second], names[second:])
    train, val, test = ([index for name in part for index in groups[name]] for part in parts)
    return train, val, test
