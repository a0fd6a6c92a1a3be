"""ImageNet-1k: shots from the train folder, the 50 000 validation pictures as the test split."""

from __future__ import annotations

from pathlib import Path

from vision_peft.data.image_folder import class_folders, class_images
from vision_peft.data.records import ImageSplits, Record
from vision_peft.data.roots import existing, first_existing
from vision_peft.data.source import Source
from vision_peft.errors import UserError

CLASSES = 1000


class ImageNet(Source):
    """`train/<wnid>/*` and `val/<wnid>/*`, directly in the root or in its folder `images`.

    The label is the position of the wnid among the sorted folders; prompts use the curated names that open_clip carries, which are
    in that order. There is no val split: the few-shot draw takes val pictures from train (see vision_peft.data.fewshot).

    Args:
        root: the folder; null looks for `imagenet` in VISION_PEFT_DATA.
    """

    def __init__(self, root: str | None = None) -> None:
        folder = first_existing(("imagenet", "ImageNet"), "data.source.root") if root is None else existing(root, "data.source.root")
        self.root = folder / "images" if (folder / "images" / "train").is_dir() else folder
        for split in ("train", "val"):
            if not (self.root / split).is_dir():
                raise UserError(f"data.source.root: {self.root / split} does not exist")

    def read(self) -> ImageSplits:
        # Imported here: open_clip takes seconds to import, and only this reader needs its list of names.
        from open_clip import IMAGENET_CLASSNAMES

        wnids = class_folders(self.root / "train")
        if len(wnids) != CLASSES:
            raise UserError(f"{self.root / 'train'}: {len(wnids)} class folders, expected {CLASSES}")
        splits = ImageSplits(self._records("train", wnids), [], self._records("val", wnids), list(IMAGENET_CLASSNAMES))
        return splits.check(self.root)

    def _records(self, split: str, wnids: list[str]) -> list[Record]:
        return [Record(path, label) for label, wnid in enumerate(wnids) for path in class_images(self._folder(split, wnid))]

    def _folder(self, split: str, wnid: str) -> Path:
        folder = self.root / split / wnid
        if not folder.is_dir():
            raise UserError(f"{folder}: does not exist (the {split} pictures must be sorted into one folder a class)")
        return folder
