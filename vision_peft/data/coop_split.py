"""The nine sets whose splits the CoOp authors published as `split_zhou_<Name>.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vision_peft.data.class_names import read_json
from vision_peft.data.records import ImageSplits, Record
from vision_peft.data.roots import existing, first_existing
from vision_peft.data.source import Source
from vision_peft.errors import UserError, nearest

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class _Layout:
    folders: tuple[str, ...]  # as CLIP-LoRA's code, then as CoOp's data guide names it
    name: str  # in split_zhou_<name>.json
    images: str  # the folder that paths in the split file are relative to


LAYOUTS = {
    "caltech101": _Layout(("Caltech101", "caltech-101"), "Caltech101", "101_ObjectCategories"),
    "dtd": _Layout(("DTD", "dtd"), "DescribableTextures", "images"),
    "eurosat": _Layout(("eurosat", "EuroSAT"), "EuroSAT", "2750"),
    "food101": _Layout(("Food101", "food-101"), "Food101", "images"),
    "oxford_flowers": _Layout(("Flower102", "oxford_flowers"), "OxfordFlowers", "jpg"),
    "oxford_pets": _Layout(("OxfordPets", "oxford_pets"), "OxfordPets", "images"),
    "stanford_cars": _Layout(("StanfordCars", "stanford_cars"), "StanfordCars", "."),
    "sun397": _Layout(("SUN397", "sun397"), "SUN397", "SUN397"),
    "ucf101": _Layout(("UCF101", "ucf101"), "UCF101", "UCF-101-midframes"),
}


class CoopSplit(Source):
    """One of the nine sets, read through its published split file.

    The split file maps each of train, val, test to entries [picture, label, class name]. Entry order is kept.

    Args:
        dataset: which set.
        root: its folder; null looks for either usual spelling (see datasets/README.md) in VISION_PEFT_DATA.
    """

    def __init__(
        self,
        dataset: Literal[
            "caltech101", "dtd", "eurosat", "food101", "oxford_flowers", "oxford_pets", "stanford_cars", "sun397", "ucf101"
        ],
        root: str | None = None,
    ) -> None:
        if dataset not in LAYOUTS:
            raise UserError(f"data.source.dataset: unknown set {dataset!r}; there are {', '.join(LAYOUTS)}{nearest(dataset, LAYOUTS)}")
        layout = LAYOUTS[dataset]
        folder = first_existing(layout.folders, "data.source.root") if root is None else existing(root, "data.source.root")
        self.file = folder / f"split_zhou_{layout.name}.json"
        self.images = folder / layout.images
        if not self.file.is_file():
            raise UserError(f"{self.file}: the split file is missing (datasets/README.md says where to get it)")

    def read(self) -> ImageSplits:
        content = read_json(self.file)
        if not isinstance(content, dict):
            raise UserError(f"{self.file}: expected an object with the keys train, val, test")
        names: dict[int, str] = {}
        splits = {split: self._records(content, split, names) for split in SPLITS}
        gap = next((label for label in range(len(names)) if label not in names), None)
        if gap is not None:
            raise UserError(f"{self.file}: labels should run from 0 to {len(names) - 1}, but no picture has label {gap}")
        ordered = [names[label] for label in sorted(names)]
        return ImageSplits(**splits, class_names=ordered).check(self.file).check_files(self.file)

    def _records(self, content: dict[str, Any], split: str, names: dict[int, str]) -> list[Record]:
        """The records of one split; adds the class names it meets to `names`."""
        if not isinstance(content.get(split), list):
            raise UserError(f"{self.file}: no list {split!r} (keys: {', '.join(content)})")
        records = []
        for number, entry in enumerate(content[split]):
            path, label, name = self._entry(entry, f"{self.file}, {split}[{number}]")
            if names.setdefault(label, name) != name:
                raise UserError(f"{self.file}, {split}[{number}]: label {label} is {name!r} here and {names[label]!r} before")
            records.append(Record(self.images / path, label))
        return records

    @staticmethod
    def _entry(entry: Any, where: str) -> tuple[Path, int, str]:
        match entry:
            case [str(path), int(label), str(name)] if label >= 0:
                return Path(path), label, name
        raise UserError(f"{where}: expected [picture, label, class name], found {entry!r}")
