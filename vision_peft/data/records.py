"""What a classification set is once it has been read: lists of labelled pictures and the names of the classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vision_peft.errors import UserError


@dataclass(frozen=True)
class Record:
    """One labelled picture.

    Attributes:
        path: the image file; for a picture held in memory, a name for messages.
        label: index into `ImageSplits.class_names`; -1 for a picture without a label.
        pixels: uint8 (H, W) grey or (H, W, 3) RGB for a picture that is not a file of its own, else None.
    """

    path: Path
    label: int
    pixels: np.ndarray | None = field(default=None, repr=False, compare=False)


def absent_classes(records: list[Record], class_names: list[str]) -> list[str]:
    """Names of the classes of which `records` holds no picture."""
    present = {record.label for record in records}
    return [name for label, name in enumerate(class_names) if label not in present]


@dataclass
class ImageSplits:
    """A set as its source gives it; a split the set does not have is an empty list. `class_names[label]` is what a prompt says."""

    train: list[Record]
    val: list[Record]
    test: list[Record]
    class_names: list[str]

    def check(self, origin: Path) -> ImageSplits:
        """Itself, once every class has been seen to have a training picture and every label a class.

        Args:
            origin: the file or folder the splits were read from, for the message.

        Raises:
            UserError: for a set without classes, a label without a class, a class without a training picture.
        """
        if not self.class_names:
            raise UserError(f"{origin}: no class was found")
        for record in [*self.train, *self.val, *self.test]:
            if not 0 <= record.label < len(self.class_names):
                raise UserError(f"{origin}: {record.path} has label {record.label}, but there are {len(self.class_names)} classes")
        empty = absent_classes(self.train, self.class_names)
        if empty:
            more = f" (nor have {len(empty) - 1} more classes)" if len(empty) > 1 else ""
            raise UserError(f"{origin}: class {empty[0]!r} has no training picture{more}")
        return self

    def check_files(self, split_file: Path) -> ImageSplits:
        """Itself, once every picture that `split_file` names has been found on disk.

        Raises:
            UserError: names the first missing picture, the split file and how many are missing.
        """
        records = [*self.train, *self.val, *self.test]
        missing = [record.path for record in records if not record.path.is_file()]
        if missing:
            raise UserError(f"{split_file} names {missing[0]}, which does not exist ({len(missing)} of {len(records)} are missing)")
        return self
