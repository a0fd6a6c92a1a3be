"""A set kept as one folder a class, with or without folders for its splits."""

from __future__ import annotations

import random
from pathlib import Path

from vision_peft.data.class_names import class_names
from vision_peft.data.images import list_images
from vision_peft.data.records import ImageSplits, Record
from vision_peft.data.roots import existing
from vision_peft.data.source import Source
from vision_peft.errors import UserError, nearest

SPLITS = ("train", "val", "test")


class ImageFolder(Source):
    """Either `root/{train,val,test}/<class>/…` (val and test may be absent), or `root/<class>/…`, which is split here.

    Classes are the folders in alphabetical order; pictures are found at any depth below them. A `root/classnames.json` may give the
    words a prompt uses. Without split folders every class is split by itself: its sorted pictures are shuffled by a stream seeded
    with (seed, class), then the first go to test, the next to val, the rest to train. Adding a class leaves the others' splits as
    they were.

    Args:
        root: the folder; a relative path starts at VISION_PEFT_DATA.
        val_fraction: share of each class for val (rounded), where there are no split folders.
        test_fraction: share of each class for test (rounded), where there are no split folders.
        seed: of that split; not the seed of the few-shot draw.
    """

    def __init__(self, root: str, val_fraction: float = 0.1, test_fraction: float = 0.2, seed: int = 0) -> None:
        self.root = existing(root, "data.source.root")
        if val_fraction < 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
            shares = f"val_fraction {val_fraction} and test_fraction {test_fraction}"
            raise UserError(f"data.source: {shares} must not be negative and must leave a share for train")
        self.val_fraction, self.test_fraction, self.seed = val_fraction, test_fraction, seed

    def read(self) -> ImageSplits:
        present = [split for split in SPLITS if (self.root / split).is_dir()]
        if present and "train" not in present:
            raise UserError(f"{self.root}: has a folder {present[0]!r} but no folder 'train'")
        return self._read_splits(present) if present else self._split_classes()

    def _read_splits(self, present: list[str]) -> ImageSplits:
        labels = class_folders(self.root / "train")
        splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
        for split in present:
            for name in class_folders(self.root / split):
                if name not in labels:
                    raise UserError(f"{self.root / split / name}: no such class in train{nearest(name, labels)}")
            for label, name in enumerate(labels):
                if split == "train" or (self.root / split / name).is_dir():
                    splits[split] += [Record(path, label) for path in class_images(self.root / split / name)]
        return ImageSplits(**splits, class_names=class_names(self.root, labels)).check(self.root)

    def _split_classes(self) -> ImageSplits:
        labels = class_folders(self.root)
        splits = ImageSplits([], [], [], class_names(self.root, labels))
        for label, name in enumerate(labels):
            records = [Record(path, label) for path in class_images(self.root / name)]
            random.Random(f"{self.seed}/{name}").shuffle(records)
            test = round(len(records) * self.test_fraction)
            val = test + round(len(records) * self.val_fraction)
            splits.test += records[:test]
            splits.val += records[test:val]
            splits.train += records[val:]
        return splits.check(self.root)


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in `folder`, sorted; hidden ones (.ipynb_checkpoints) and macOS archive litter are no classes.

    Raises:
        UserError: there is none.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__MACOSX")))
    if not names:
        raise UserError(f"{folder}: no class folders in it")
    return names


def class_images(folder: Path) -> list[Path]:
    """The pictures of one class, sorted.

    Raises:
        UserError: the class is empty.
    """
    images = list_images(folder)
    if not images:
        raise UserError(f"{folder}: the class is empty (no picture in it)")
    return images
