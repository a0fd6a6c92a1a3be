"""Pictures that a generator is adapted to: a few of one domain, with prompts, and, for prior preservation, pictures of the class."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from vision_peft.backbones.base import Preprocess
from vision_peft.data.images import list_images, load_rgb
from vision_peft.data.loader import ResumableLoader
from vision_peft.data.parallel import map_threads
from vision_peft.data.picture_data import PictureData
from vision_peft.data.records import Record
from vision_peft.data.roots import existing
from vision_peft.data.sampler import Draw, OrderedSampler
from vision_peft.errors import UserError, nearest


@dataclass(frozen=True)
class Picture:
    """A file and what a model that takes texts is told of it."""

    path: Path
    prompt: str = ""


def read_pictures(source: str, key: str, domain: str | None = None, split: str | None = None, prompt: str | None = None) -> list[Picture]:
    """Of a folder, or of a CSV file with the columns path and (not necessarily) domain, split, prompt.

    Args:
        domain, split: rows that count; None: all.
        prompt: instead of the CSV's.

    Raises:
        UserError: nothing there, a column that is asked for is missing, or no picture is left.
    """
    place = existing(source, key)
    if place.is_dir():
        found = [Picture(path, prompt or "") for path in list_images(place)]
        if not found:
            raise UserError(f"{key}: no picture in {place}")
        return found
    with place.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        columns, rows = reader.fieldnames or [], list(reader)
    for column, value in (("path", ""), ("domain", domain), ("split", split)):
        if value is not None and column not in columns:
            raise UserError(f"{place}: no column {column!r} (columns: {', '.join(columns)}){nearest(column, columns)}")
    for column, value in (("domain", domain), ("split", split)):
        there = list(dict.fromkeys(row[column] for row in rows)) if value is not None else []
        rows = [row for row in rows if value is None or row[column] == value]
        if not rows:
            raise UserError(f"{key}: no row of {place} has {column} {value!r}; there are {', '.join(there)}{nearest(value, there)}")
    found = [Picture(place.parent / row["path"], prompt if prompt is not None else row.get("prompt") or "") for row in rows]
    for picture in found:
        if not picture.path.is_file():
            raise UserError(f"{place} names {picture.path}, which does not exist")
    return found


def load_pictures(pictures: Sequence[Picture], size: int, fit: str = "crop") -> Tensor:
    """uint8 (N, 3, size, size); of other sizes and shapes the middle square, or the whole picture squashed (fit: "squash")."""
    return torch.stack(map_threads(lambda picture: _square(picture, size, fit), pictures, "decoding pictures"))


def _square(picture: Picture, size: int, fit: str) -> Tensor:
    image = load_rgb(Record(picture.path, -1))
    if fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


class Shown(Protocol):
    """Pictures as a step of training takes them."""

    def __len__(self) -> int: ...

    def __call__(self, index: int, mirrored: bool) -> Tensor: ...


class Plain:
    """(3, S, S) in [-1, 1] of uint8 (N, 3, S, S)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, index: int, mirrored: bool) -> Tensor:
        image = self.images[index]
        return (image.flip(2) if mirrored else image).float() / 127.5 - 1


class Encoded:
    """(C, h, w): what an encoder said of each picture and, where these are shown, of its mirror picture."""

    def __init__(self, images: Tensor, encode: Callable[[Tensor], Tensor], mirrored: bool) -> None:
        self.views = [encode(images), encode(images.flip(3))] if mirrored else [encode(images)]

    def __len__(self) -> int:
        return len(self.views[0])

    def __call__(self, index: int, mirrored: bool) -> Tensor:
        return self.views[mirrored][index]


class PictureDataset(Dataset):
    """{image, prompt}, `repeat` times; with prior pictures also {prior_image, prior_prompt}, drawn by seed, epoch and index."""

    def __init__(
        self, images: Shown, prompts: Sequence[str], flip: bool, seed: int, repeat: int = 1,
        prior: tuple[Shown, Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        self.images, self.prompts, self.flip, self.seed, self.repeat, self.prior = images, list(prompts), flip, seed, repeat, prior

    def __len__(self) -> int:
        return len(self.images) * self.repeat

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        index, epoch = key if isinstance(key, tuple) else (key, -1)
        draw = random.Random(f"{self.seed}/{epoch}/{index}")
        own = index % len(self.images)
        found = {"image": self.images(own, self._mirrored(draw, epoch >= 0)), "prompt": self.prompts[own]}
        if self.prior is not None:
            other = draw.randrange(len(self.prior[0]))
            found |= {"prior_image": self.prior[0](other, self._mirrored(draw, True)), "prior_prompt": self.prior[1][other]}
        return found

    def _mirrored(self, draw: random.Random, training: bool) -> bool:
        return self.flip and training and draw.random() < 0.5


class GeneratorImages(PictureData):
    """Pictures of any size, brought to the generator's.

    The task sets `preprocess` (its backbone's) before a loader is asked for, and `encode` where batches should hold what an encoder says of
    pictures (uint8 (N, 3, S, S)) instead of the pictures.

    Args:
        images: folder, or CSV file with path and, where it has them, domain, split and prompt; relative paths start at VISION_PEFT_DATA.
        domain, split: rows of a CSV that are trained on; null: all.
        prompt: of every picture, instead of the CSV's; "" for unconditional models, a number for models of classes.
        held_out: split of a CSV whose rows of the same domain are for validation and test (`ref`); null: none.
        prior, prior_domain, prior_split, prior_prompt: pictures of the class that should be kept (DreamBooth), one beside each picture.
        fit: other shapes give their middle square (`crop`) or are squashed.
        flip: mirror half of the time.
        repeat: times that a picture is seen an epoch; few pictures would make epochs of one step.
        batch_size: pictures a device and step.
        seed: of order and mirroring.
    """

    def __init__(
        self,
        images: str,
        domain: str | None = None,
        split: str | None = None,
        prompt: str | None = None,
        held_out: str | None = None,
        prior: str | None = None,
        prior_domain: str | None = None,
        prior_split: str | None = None,
        prior_prompt: str | None = None,
        fit: Literal["crop", "squash"] = "crop",
        flip: bool = True,
        repeat: int = 1,
        batch_size: int = 4,
        seed: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("repeat", repeat)):
            if value < 1:
                raise UserError(f"data.{name}: must be at least 1, not {value}")
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.fit, self.flip, self.repeat, self.batch_size, self.seed, self.num_workers = fit, flip, repeat, batch_size, seed, num_workers
        self.pictures = {"train": read_pictures(images, "data.images", domain, split, prompt)}
        if held_out is not None:
            self.pictures["val"] = read_pictures(images, "data.held_out", domain, held_out, prompt)
        if prior is not None:
            self.pictures["prior"] = read_pictures(prior, "data.prior", prior_domain, prior_split, prior_prompt)
        self.preprocess: Preprocess | None = None
        self.encode: Callable[[Tensor], Tensor] | None = None
        self._loaded: dict[str, Tensor] = {}

    @property
    def prompts(self) -> list[str]:
        """Every prompt of the data, once."""
        return list(dict.fromkeys(picture.prompt for pictures in self.pictures.values() for picture in pictures))

    def images(self, part: str) -> Tensor:
        """uint8 (N, 3, S, S) of train, val or prior, decoded once; (0, 3, S, S) where there are none.

        Raises:
            UserError: names the first picture that is broken.
        """
        if part not in self._loaded:
            if self.preprocess is None:
                raise RuntimeError("preprocess must be set before pictures are decoded")
            size, pictures = self.preprocess.size, self.pictures.get(part, [])
            self._loaded[part] = load_pictures(pictures, size, self.fit) if pictures else torch.zeros(0, 3, size, size, dtype=torch.uint8)
        return self._loaded[part]

    def train_dataloader(self) -> ResumableLoader:
        prior = (self._shown("prior", self.flip), self._prompts("prior")) if "prior" in self.pictures else None
        shown = self._shown("train", self.flip)
        return self._training_loader(PictureDataset(shown, self._prompts("train"), self.flip, self.seed, self.repeat, prior))

    def val_dataloader(self) -> DataLoader:
        """Of the held-out pictures; where there are none, of those that are trained on (their loss under fixed noise)."""
        part = "val" if "val" in self.pictures else "train"
        dataset = PictureDataset(self._shown(part, False), self._prompts(part), False, self.seed)
        return DataLoader(dataset, batch_size=self.batch_size, sampler=OrderedSampler(dataset, *self._place()), **self._loading())

    def _shown(self, part: str, mirrored: bool) -> Shown:
        return Plain(self.images(part)) if self.encode is None else Encoded(self.images(part), self.encode, mirrored)

    def _prompts(self, part: str) -> list[str]:
        return [picture.prompt for picture in self.pictures[part]]

    test_dataloader = val_dataloader
