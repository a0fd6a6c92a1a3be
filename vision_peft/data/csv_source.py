"""A set listed in a CSV file with the columns path, label, split."""

from __future__ import annotations

import csv
from pathlib import Path

from vision_peft.data.class_names import class_names
from vision_peft.data.records import ImageSplits, Record
from vision_peft.data.roots import existing
from vision_peft.data.source import Source
from vision_peft.errors import UserError, nearest

COLUMNS = ("path", "label", "split")
SPLITS = ("train", "val", "test")


class CsvSource(Source):
    """Pictures named in a CSV file; more columns than the three are allowed and ignored.

    Paths are relative to the CSV's folder. Labels are words; their order (numbers by value, else alphabetical) gives the indices.
    A `classnames.json` beside the CSV may give the words a prompt uses. Row order is kept: the few-shot draw depends on it.

    Args:
        file: the CSV file; a relative path starts at VISION_PEFT_DATA.
    """

    def __init__(self, file: str) -> None:
        self.file = existing(file, "data.source.file")
        if not self.file.is_file():
            raise UserError(f"data.source.file: {self.file} is a folder; name the CSV file in it")

    def read(self) -> ImageSplits:
        rows = self._rows()
        labels = sorted({label for _, label, _ in rows}, key=_order)
        index = {label: number for number, label in enumerate(labels)}
        splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
        for path, label, split in rows:
            splits[split].append(Record(path, index[label]))
        return ImageSplits(**splits, class_names=class_names(self.file.parent, labels)).check(self.file).check_files(self.file)

    def _rows(self) -> list[tuple[Path, str, str]]:
        """(path, label, split) of every line that is not blank, each checked."""
        rows: list[tuple[Path, str, str]] = []
        split_of: dict[Path, str] = {}
        # utf-8-sig: spreadsheets write a byte-order mark, which would otherwise become part of the first column's name.
        with self.file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            for column in COLUMNS:
                if column not in columns:
                    raise UserError(f"{self.file}: no column {column!r} (columns: {', '.join(columns)}){nearest(column, columns)}")
            for row in reader:
                name, label, split = ((row[column] or "").strip() for column in COLUMNS)
                where = f"{self.file}, line {reader.line_num}"
                for column, value in zip(COLUMNS, (name, label, split)):
                    if not value:
                        raise UserError(f"{where}: {column} is missing")
                if split not in SPLITS:
                    raise UserError(f"{where}: unknown split {split!r}, expected train, val or test{nearest(split.lower(), SPLITS)}")
                path = self.file.parent / name
                if split_of.setdefault(path, split) != split:
                    raise UserError(f"{where}: {name} is in {split} and in {split_of[path]}; a picture belongs to one split")
                rows.append((path, label, split))
        return rows


def _order(label: str) -> tuple[int, int, str]:
    """Numbers first and by value, so that class "10" comes after class "2"."""
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)
