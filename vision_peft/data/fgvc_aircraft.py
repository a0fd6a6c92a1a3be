"""FGVC-Aircraft (100 variants), read through its own lists."""

from __future__ import annotations

from pathlib import Path

from vision_peft.data.records import ImageSplits, Record
from vision_peft.data.roots import existing, first_existing
from vision_peft.data.source import Source
from vision_peft.errors import UserError, nearest


class FgvcAircraft(Source):
    """Pictures `images/<id>.jpg`; `variants.txt` names the classes, one a line, and a line's number is the label;
    `images_variant_{train,val,test}.txt` hold lines `<id> <variant>`.

    Args:
        root: the folder that holds these files; null looks for `fgvc_aircraft` in VISION_PEFT_DATA.
    """

    def __init__(self, root: str | None = None) -> None:
        key = "data.source.root"
        self.root = first_existing(("fgvc_aircraft", "FGVCAircraft"), key) if root is None else existing(root, key)
        for name in ("variants.txt", *(f"images_variant_{split}.txt" for split in ("train", "val", "test"))):
            if not (self.root / name).is_file():
                raise UserError(f"{self.root / name}: the split file is missing")

    def read(self) -> ImageSplits:
        variants = [line.strip() for line in _lines(self.root / "variants.txt") if line.strip()]
        index = {variant: label for label, variant in enumerate(variants)}
        splits = {split: self._records(self.root / f"images_variant_{split}.txt", index) for split in ("train", "val", "test")}
        for split, records in splits.items():
            ImageSplits(records, [], [], variants).check_files(self.root / f"images_variant_{split}.txt")
        return ImageSplits(**splits, class_names=variants).check(self.root / "variants.txt")

    def _records(self, file: Path, index: dict[str, int]) -> list[Record]:
        records = []
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            name, _, variant = line.strip().partition(" ")  # variants contain blanks, ids do not
            if not variant:
                raise UserError(f"{file}, line {number}: label missing")
            if variant not in index:
                raise UserError(f"{file}, line {number}: {variant!r} is not in variants.txt{nearest(variant, index)}")
            records.append(Record(self.root / "images" / f"{name}.jpg", index[variant]))
        return records


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()
