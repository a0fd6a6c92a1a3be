"""A segmentation set listed in a CSV file: pictures, their label images, fields of view, slices of volumes, splits."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vision_peft.data.roots import existing
from vision_peft.errors import UserError, nearest

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class MaskRecord:
    """One picture (or one slice of a volume) and what is known of it."""

    image: Path
    mask: Path | None = None
    fov: Path | None = None  # only where it is above 0 does the picture count
    slice: int | None = None

    @property
    def name(self) -> str:
        """For files that are written about it."""
        stem = self.image.name.split(".")[0]
        return stem if self.slice is None else f"{stem}_{self.slice:04d}"


def read_mask_csv(file: str, columns: Mapping[str, str], key: str) -> dict[str, list[MaskRecord]]:
    """Records by split, in the file's order; paths are relative to the CSV's folder, a relative `file` starts at VISION_PEFT_DATA.

    Args:
        columns: names of the columns `image`, `mask`, `split`, and, where the set has them, `fov` and `slice`.
        key: the config key of `file`.

    Raises:
        UserError: names the file, the line and what is wrong: a missing column, file or value, an unknown split, a picture twice.
    """
    path = existing(file, key)
    if not path.is_file():
        raise UserError(f"{key}: {path} is a folder; name the CSV file in it")
    splits: dict[str, list[MaskRecord]] = {split: [] for split in SPLITS}
    seen: dict[tuple[Path, int | None], str] = {}
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        there = reader.fieldnames or []
        for role in ("image", "mask", "split"):
            if columns[role] not in there:
                raise UserError(f"{path}: no column {columns[role]!r} (columns: {', '.join(there)}){nearest(columns[role], there)}")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            given = {role: (row.get(column) or "").strip() for role, column in columns.items()}
            split = given["split"]
            if split not in SPLITS:
                raise UserError(f"{where}: unknown split {split!r}, expected train, val or test{nearest(split.lower(), SPLITS)}")
            record = _record(given, path.parent, where)
            place = (record.image, record.slice)
            if place in seen:
                raise UserError(f"{where}: {given['image']} is listed twice, in {seen[place]} and in {split}")
            seen[place] = split
            splits[split].append(record)
    return splits


def _record(given: Mapping[str, str], folder: Path, where: str) -> MaskRecord:
    for role in ("image", "mask"):
        if not given[role]:
            raise UserError(f"{where}: {role} is missing")
    files = {role: folder / given[role] for role in ("image", "mask", "fov") if given.get(role)}
    for role, file in files.items():
        if not file.is_file():
            raise UserError(f"{where}: {role} {file} does not exist")
    number = given.get("slice") or None
    if number is not None and not number.isdecimal():
        raise UserError(f"{where}: slice is {number!r}, must be a number from 0")
    return MaskRecord(**files, slice=None if number is None else int(number))
