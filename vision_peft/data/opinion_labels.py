"""What the label files of quality sets hold: ratings, read from texts that know where they are from (tables, lines, MATLAB arrays)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vision_peft.data.placement import Text
from vision_peft.errors import UserError


@dataclass(frozen=True)
class Rating:
    """A picture, named by the end of its path in the archives, and a row of split.csv; see quality/opinions.py."""

    picture: str
    mos: float
    std: float | None = None
    reference: str | None = None
    split: str | None = None


class Value(NamedTuple):
    """A text and its place in its file, for messages."""

    text: str
    where: str

    def word(self) -> str:
        """Raises: UserError: empty."""
        if not self.text:
            raise UserError(f"{self.where} is missing")
        return self.text

    def number(self) -> float:
        """Raises: UserError: empty, or not a finite number."""
        try:
            value = float(self.word())
        except ValueError:
            raise UserError(f"{self.where} is {self.text!r}, not a number") from None
        if not math.isfinite(value):
            raise UserError(f"{self.where} is {self.text}, not a finite number")
        return value


def read_table(text: Text, columns: Sequence[str], sheet: str | None = None) -> list[dict[str, Value]]:
    """The rows below the first one that names all `columns`; rows in which all of these are empty are passed over.

    Args:
        sheet: of an .xlsx workbook; None: the first one.

    Raises:
        UserError: not a table, or one without these columns.
    """
    rows = _sheet(text, sheet) if text.origin.lower().endswith(".xlsx") else _csv(text)
    headers = [place for place, (_, cells) in enumerate(rows) if set(columns) <= {cell.strip() for cell in cells.values()}]
    if not headers:
        first = ", ".join(rows[0][1].values())[:200] if rows else "there is none"
        raise UserError(f"{text.origin}: no row names the columns {', '.join(columns)} (the first row: {first!r})")
    keys = {cell.strip(): key for key, cell in rows[headers[0]][1].items()}
    found = []
    for where, cells in rows[headers[0] + 1 :]:
        values = {name: Value(cells.get(keys[name], "").strip(), f"{where}: {name}") for name in columns}
        if any(value.text for value in values.values()):
            found.append(values)
    return found


def read_lines(text: Text) -> list[Value]:
    """The lines that are not empty."""
    lines = enumerate(_decoded(text).splitlines(), start=1)
    return [Value(line.strip(), f"{text.origin}, line {number}") for number, line in lines if line.strip()]


def read_arrays(text: Text, *names: str) -> list[list[Value]]:
    """The arrays (of numbers, or cells of texts) with these names in a MATLAB file, each flat, all of one length.

    Raises:
        UserError: no MATLAB file, or one without them, or they differ in length.
    """
    from scipy.io import loadmat  # not needed for most sets

    try:
        found = loadmat(io.BytesIO(text.content), variable_names=names, squeeze_me=True)
    except Exception as error:  # arbitrary bytes raise whatever goes wrong inside the parser: MatReadError, zlib.error, TypeError ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{text.origin}: no MATLAB file, or a damaged one ({reason})") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{text.origin}: holds no array {missing[0]!r}")
    arrays = {name: np.atleast_1d(found[name]).ravel() for name in names}
    check_lengths({f"{text.origin}, {name}": len(array) for name, array in arrays.items()})
    return [[Value(str(each), f"{text.origin}, {name}({i})") for i, each in enumerate(array, start=1)] for name, array in arrays.items()]


def check_lengths(lengths: dict[str, int]) -> None:
    """Raises: UserError: lists that belong together, entry by entry, are not of one length."""
    if len(set(lengths.values())) > 1:
        raise UserError(f"lists differ in length: {', '.join(f'{name} has {length} entries' for name, length in lengths.items())}")


def _sheet(text: Text, sheet: str | None) -> list[tuple[str, dict[int, str]]]:
    from python_calamine import CalamineError, load_workbook  # not needed for most sets

    try:
        book = load_workbook(io.BytesIO(text.content))
    except CalamineError as error:
        raise UserError(f"{text.origin}: no .xlsx workbook, or a damaged one ({error})") from error
    names = book.sheet_names
    if sheet is not None and sheet not in names:
        raise UserError(f"{text.origin}: a workbook without the sheet {sheet!r} (sheets: {', '.join(names)})")
    rows = book.get_sheet_by_name(sheet or names[0]).to_python(skip_empty_area=False)
    return [(f"{text.origin}, row {number}", {i: str(cell) for i, cell in enumerate(row)}) for number, row in enumerate(rows, start=1)]


def _csv(text: Text) -> list[tuple[str, dict[int, str]]]:
    reader = csv.reader(io.StringIO(_decoded(text), newline=""))
    try:
        return [(f"{text.origin}, line {reader.line_num}", dict(enumerate(row))) for row in reader]
    except csv.Error as error:
        raise UserError(f"{text.origin}: not a CSV file ({error})") from error


def _decoded(text: Text) -> str:
    try:
        return text.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{text.origin}: not a text file ({error})") from error
