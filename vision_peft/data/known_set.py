"""What is known of a set: where it is, what it comes as, how many pictures it should have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vision_peft.data.placement import Placement
from vision_peft.data.source import Source


class Counts(NamedTuple):
    """Classes (0 for pictures with scores), and pictures a split; 0 for a split that a set does not have."""

    classes: int
    train: int
    val: int
    test: int

    def __str__(self) -> str:
        classes = f"{self.classes} classes, " if self.classes else ""
        return f"{classes}train {self.train}, val {self.val or 'none'}, test {self.test or 'none'}"


@dataclass(frozen=True)
class KnownSet:
    """One set.

    Attributes:
        name: on the command line and, where it is one of CoOp's nine, in YAML.
        folders: the spellings of its folder, in the order in which its source looks for them; a new set gets the first.
        counts: quoted from memory, not counted in the archives.
        placement: which file of its archives goes where.
        source: its reader, given the folder.
        recalled_from: whose the counts are.
    """

    name: str
    folders: tuple[str, ...]
    counts: Counts
    placement: Placement
    source: Callable[[str], Source]
    recalled_from: str = "CoOp's paper"

    def folder(self, root: Path) -> Path:
        """Where the set is in `root`, or will be."""
        places = [root / name for name in self.folders]
        return next((place for place in places if place.exists()), places[0])

    def count(self, folder: Path) -> Counts:
        """What is in `folder`, read by the set's own source."""
        splits = self.source(str(folder)).read()
        return Counts(len(splits.class_names), len(splits.train), len(splits.val), len(splits.test))
