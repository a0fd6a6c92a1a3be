"""Pictures without labels, as pairs of crops for the training of a quality-aware encoder."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vision_peft.data.images import list_images, load_rgb
from vision_peft.data.loader import ResumableLoader
from vision_peft.data.parallel import map_threads
from vision_peft.data.picture_data import PictureData
from vision_peft.data.quality_views import QualityViews
from vision_peft.data.records import Record
from vision_peft.data.roots import existing
from vision_peft.data.sampler import Draw, OrderedSampler
from vision_peft.errors import UserError

CACHE_LIMIT = 4 * 2**30  # bytes of decoded pictures


class PairDataset(Dataset):
    """`query` and `key` crops (2 (n + 1), 3, P, P) of a picture; what is drawn depends on seed, epoch and index alone."""

    def __init__(self, pictures: Sequence[np.ndarray | Path], views: QualityViews, seed: int) -> None:
        self.pictures, self.views, self.seed = pictures, views, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: int | Draw) -> dict[str, Tensor]:
        index, epoch = key if isinstance(key, tuple) else (key, -1)
        draw = random.Random(f"{self.seed}/{epoch}/{index}").getrandbits(63)  # hashed: neighbours give unrelated streams
        picture = self.pictures[index]
        picture = np.asarray(load_rgb(Record(picture, -1))) if isinstance(picture, Path) else picture
        image = torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255
        query, key_crops = self.views(image, torch.Generator().manual_seed(draw))
        return {"query": query, "key": key_crops}


class PristineImages(PictureData):
    """Pairs of crops of whole, undistorted (or naturally distorted) pictures. Batches are PairDataset's items, stacked.

    Pictures too small for a pair at half size are left out, with a warning. Nothing is resized or normalised.

    Args:
        images: folders of pictures, or CSV files with the columns path and (not necessarily) split, of which the rows called val are
            held out and those called test left alone; relative paths start at VISION_PEFT_DATA.
        patch, distortions, kinds, overlap: see QualityViews; `kinds` null: the whole bank.
        val_share: held out by `seed`, where no file says what is.
        seed: of draws, order and distortions.
        batch_size: pictures a device and step; each is 2 (distortions + 1) pairs.
        num_workers: processes that distort.
        cache_images: keep the pictures decoded in memory.
    """

    def __init__(
        self,
        images: str | list[str],
        patch: int = 160,
        distortions: int = 11,
        kinds: list[str] | None = None,
        overlap: tuple[float, float] = (0.1, 0.3),
        val_share: float = 0.1,
        seed: int = 1,
        batch_size: int = 8,
        num_workers: int = 0,
        cache_images: bool = True,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # more processes than pictures held out: some have none
        if batch_size < 1:
            raise UserError(f"data.batch_size: must be at least 1, not {batch_size}")
        if not 0 < val_share < 1:
            raise UserError(f"data.val_share: must be between 0 and 1, not {val_share}")
        options = {} if kinds is None else {"kinds": tuple(kinds)}
        self.views = QualityViews(patch, distortions, overlap=tuple(overlap), **options)
        self.seed, self.batch_size, self.num_workers, self.cache_images = seed, batch_size, num_workers, cache_images
        sources = [images] if isinstance(images, str) else images
        self.splits = _divided([row for source in sources for row in _listed(source)], val_share, seed)
        if not self.splits["train"]:
            raise UserError(f"data.images: no picture to train on in {', '.join(sources)}")
        self._pictures: dict[str, list[np.ndarray] | list[Path]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Decode every picture of a stage once. UserError names the first that is broken."""
        for split in ("train", "val") if stage in (None, "fit") else ("val",):
            if split not in self._pictures:
                self._pictures[split] = self._decoded(split)

    def train_dataloader(self) -> ResumableLoader:
        dataset = PairDataset(self._pictures["train"], self.views, self.seed)
        return self._training_loader(dataset)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if not self._pictures["val"]:
            return []
        dataset = PairDataset(self._pictures["val"], self.views, self.seed)
        return DataLoader(dataset, batch_size=1, sampler=OrderedSampler(dataset, *self._place()), **self._loading())

    def test_dataloader(self) -> DataLoader:
        raise UserError("data: pictures without scores have no test; `vision-peft quality` measures what an encoder is good for")

    def _decoded(self, split: str) -> list[np.ndarray] | list[Path]:
        need = self.views.smallest_side
        paths = self.splits[split]
        found = map_threads(lambda path: self._read(path), paths, f"decoding {split} pictures")
        kept = [picture for picture, (height, width) in found if min(height, width) >= need]
        if len(kept) < len(paths):
            first = next(path for path, (_, size) in zip(paths, found) if min(size) < need)
            small = f"{len(paths) - len(kept)} of {len(paths)} {split} pictures"
            text = f"{small} are smaller than {need} pixels, which crops of {self.views.patch} need"
            if not kept and split == "train":
                raise UserError(f"data.images: {text}, e.g. {first}: choose a smaller data.patch")
            rank_zero_warn(f"{text}: left out (the first is {first})")
        if self.cache_images and sum(each.nbytes for each in kept) > CACHE_LIMIT:
            raise UserError(f"data.cache_images: would take more than {CACHE_LIMIT >> 30} GiB for {len(kept)} pictures; set it to false")
        return kept

    def _read(self, path: Path) -> tuple[np.ndarray | Path, tuple[int, int]]:
        """A picture, or its path where it is to be decoded at each use, and its height and width."""
        pixels = np.asarray(load_rgb(Record(path, -1)))
        return pixels if self.cache_images else path, pixels.shape[:2]


def pictures_of(file: Path, split: str) -> list[Path]:
    """The rows of a CSV file that belong to a split."""
    return [path for path, own in _listed(str(file)) if own == split]


def _listed(source: str) -> list[tuple[Path, str]]:
    """Pictures of a folder or a CSV file, with their split, "" where nothing says it."""
    place = existing(source, "data.images")
    if place.is_dir():
        return [(path, "") for path in list_images(place)]
    with place.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if "path" not in (reader.fieldnames or []):
            raise UserError(f"{place}: no column 'path' (columns: {', '.join(reader.fieldnames or [])})")
        rows = [(place.parent / (row["path"] or ""), row.get("split") or "") for row in reader]
    for path, _ in rows:
        if not path.is_file():
            raise UserError(f"{place} names {path}, which does not exist")
    return rows


def _divided(rows: list[tuple[Path, str]], share: float, seed: int) -> dict[str, list[Path]]:
    """Train and val; of rows without a split a share is drawn for val if no row is called so."""
    train = [path for path, split in rows if split in ("", "train")]
    val = [path for path, split in rows if split == "val"]
    if not val and len(train) > 1:
        chosen = set(random.Random(f"val/{seed}").sample(range(len(train)), max(1, round(share * len(train)))))
        val = [path for index, path in enumerate(train) if index in chosen]
        train = [path for index, path in enumerate(train) if index not in chosen]
    return {"train": train, "val": val}
