"""What the numbers of a label image mean: one foreground, several classes, or objects numbered one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from vision_peft.data.images import BadImage
from vision_peft.data.mask_records import MaskRecord
from vision_peft.data.pixels import load_labels

MaskKind = Literal["binary", "multiclass", "instance"]


def read_mask(record: MaskRecord, kind: MaskKind, classes: Mapping[int, str] | None, size: tuple[int, int]) -> np.ndarray:
    """int64 (H, W): 0 is background; 1 the foreground, 1..C the classes in the order of `classes`, or 1..n the objects.

    Args:
        classes: name by stored number; for `multiclass`.
        size: of the picture, which the mask must have too.

    Raises:
        BadImage: another size, numbers that stand for nothing; names the file and the numbers.
    """
    values = load_labels(record.mask, record.slice)
    if values.shape != size:
        theirs, ours = (f"{width} x {height}" for height, width in (values.shape, size))
        raise BadImage(f"{record.mask}: is {theirs} pixels, but its picture {record.image.name} is {ours}")
    if kind == "instance":
        return values
    found = np.unique(values)
    foreground = found[found != 0]
    if kind == "binary":
        if len(foreground) > 1:
            more = "a binary mask holds 0 and one other number (data.kind: multiclass, instance)"
            raise BadImage(f"{record.mask}: holds {_some(found)}; {more}")
        return (values != 0).astype(np.int64)
    unknown = [int(value) for value in foreground if int(value) not in classes]
    if unknown:
        named = _some([*classes])
        raise BadImage(f"{record.mask}: holds {_some(unknown)}, for which data.classes has no name (it has {named})")
    mapped = np.zeros_like(values)
    for index, value in enumerate(classes, start=1):
        mapped[values == value] = index
    return mapped


def read_field_of_view(record: MaskRecord, size: tuple[int, int]) -> np.ndarray:
    """bool (H, W): where the picture counts; everywhere without a field of view."""
    if record.fov is None:
        return np.ones(size, bool)
    values = load_labels(record.fov)
    if values.shape != size:
        raise BadImage(f"{record.fov}: is {values.shape[1]} x {values.shape[0]} pixels, but its picture is {size[1]} x {size[0]}")
    return values > 0


def _some(values: np.ndarray | list[int]) -> str:
    shown = ", ".join(str(int(value)) for value in values[:6])
    return f"{shown}, ... ({len(values)} numbers)" if len(values) > 6 else shown
