"""Pictures with masks as the items that training and evaluation take."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vision_peft.data.geometry import Frame, GeometryName
from vision_peft.data.intensity import IntensityName, to_unit
from vision_peft.data.mask_augment import MaskAugment
from vision_peft.data.mask_labels import MaskKind, read_field_of_view, read_mask
from vision_peft.data.mask_records import MaskRecord
from vision_peft.data.pixels import load_pixels
from vision_peft.data.sampler import Draw

FOREGROUND = 0.5  # share of random patches whose middle is on a target


@dataclass(frozen=True)
class Decoding:
    """How a set's files become numbers; see read_mask and to_unit."""

    kind: MaskKind
    classes: dict[int, str] | None
    intensity: IntensityName
    window: tuple[float, float]


@dataclass(frozen=True)
class Reading:
    """How a network sees a set.

    Attributes:
        geometry, size: its square, see Frame.
        patch: side in the picture's own pixels of the pieces that the network sees, each resized to `size`; None: the whole picture.
        mean, std: of [0, 1], subtracted and divided by at last.
        one: each item asks for one class or object, instead of all.
    """

    decoding: Decoding
    geometry: GeometryName
    size: int
    patch: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    one: bool

    def normalized(self, image: Tensor) -> Tensor:
        return (image - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


class Picture(NamedTuple):
    """A record's numbers at their own size."""

    image: Tensor  # float32 (3, H, W) in [0, 1]
    labels: Tensor  # int64 (H, W); all 0 where there is no mask
    valid: Tensor  # bool (H, W)
    spacing: tuple[float, float]


def read_picture(record: MaskRecord, decoding: Decoding) -> Picture:
    """Decode picture, mask and field of view. BadImage names what is wrong."""
    pixels = load_pixels(record.image, record.slice)
    image = torch.from_numpy(to_unit(pixels, decoding.intensity, decoding.window, record.image)).permute(2, 0, 1).contiguous()
    size = tuple(image.shape[1:])
    labels = torch.zeros(size, dtype=torch.int64)
    if record.mask is not None:
        labels = torch.from_numpy(read_mask(record, decoding.kind, decoding.classes, size))
    return Picture(image, labels, torch.from_numpy(read_field_of_view(record, size)), pixels.spacing)


class MaskDataset(Dataset):
    """Training items: image float32 (3, S, S), target int64 (s, s), valid bool (s, s), index, draw; s is the patch's side, or S.

    `draw` is a number that an item's random prompts follow from. Targets are 0 or 1, or class indices of a semantic head.

    Args:
        pictures: decoded, or None to decode at each call.
        repeats: items a picture and epoch.
        augment: None gives the evaluation's view, so that what is computed from items can be kept (`views` is then 1).
    """

    def __init__(
        self,
        records: Sequence[MaskRecord],
        reading: Reading,
        pictures: Sequence[Picture] | None,
        augment: MaskAugment | None,
        seed: int,
        repeats: int = 1,
    ) -> None:
        self.records, self.reading, self.pictures, self.augment = list(records), reading, pictures, augment
        self.seed, self.repeats = seed, repeats
        self.views = 1 if augment is None and reading.patch is None and not reading.one else None

    def __len__(self) -> int:
        return len(self.records) * self.repeats

    def picture(self, index: int) -> Picture:
        return read_picture(self.records[index], self.reading.decoding) if self.pictures is None else self.pictures[index]

    def at(self, index: int, epoch: int) -> Tensor:
        """The image of an index in an epoch, float32 (3, S, S)."""
        return self[Draw(index, epoch)]["image"]

    def with_image(self, key: int | Draw, image: Tensor) -> dict[str, Any]:
        """The item, with something else in the place of its image."""
        return {**self[key], "image": image}

    def identity(self) -> str:
        """Changes with anything the pictures depend on."""
        return repr(([(str(each.image), each.slice, each.image.stat().st_mtime_ns) for each in self.records], self.reading))

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        rng = random.Random(f"{self.seed}/{epoch}/{index}")  # hashed: neighbours give unrelated streams
        picture = self.picture(index % len(self.records))
        labels = picture.labels
        if self.reading.one:
            found = [int(each) for each in labels.unique() if each != 0]
            labels = (labels == rng.choice(found)).long() if found else torch.zeros_like(labels)
        elif self.reading.decoding.kind == "instance":
            labels = (labels != 0).long()
        image, target, valid = self._square(picture.image, labels[None], picture.valid[None], rng)
        if self.augment is not None:
            image, target, valid = self.augment(image, target, valid, rng.getrandbits(32))
        if self.reading.patch is not None:
            side = self.reading.patch
            image = Frame.of(side, side, self.reading.size, "squash").fit(image)
        found = {"image": self.reading.normalized(image), "target": target[0], "valid": valid[0]}
        return {**found, "index": index, "draw": rng.getrandbits(32)}

    def _square(self, image: Tensor, labels: Tensor, valid: Tensor, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        if self.reading.patch is not None:
            return _random_patch(image, labels, valid, self.reading.patch, rng)
        frame = Frame.of(*image.shape[1:], self.reading.size, self.reading.geometry)
        return frame.fit(image), frame.fit(labels, labels=True), frame.fit(valid, labels=True)


def _random_patch(image: Tensor, labels: Tensor, valid: Tensor, side: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """A square around a random pixel of the target or, as often, of all that is valid; pictures smaller than it are padded."""
    height, width = image.shape[1:]
    short = max(side - height, 0), max(side - width, 0)
    if any(short):
        image, labels, valid = (torch.nn.functional.pad(each, (0, short[1], 0, short[0])) for each in (image, labels, valid))
        height, width = image.shape[1:]
    wanted = labels[0].bool() & valid[0] if rng.random() < FOREGROUND else valid[0]
    places = wanted.flatten().nonzero()[:, 0]
    place = int(places[rng.randrange(len(places))]) if len(places) else rng.randrange(height * width)
    top = min(max(place // width - side // 2, 0), height - side)
    left = min(max(place % width - side // 2, 0), width - side)
    window = (slice(None), slice(top, top + side), slice(left, left + side))
    return image[window], labels[window], valid[window]


class Case(NamedTuple):
    """An evaluation item: a whole picture at its own size, and what the network sees of it."""

    image: Tensor  # float32 (3, S, S) in its frame; with patches (3, H, W)
    target: Tensor  # int64 (H, W)
    valid: Tensor  # bool (H, W)
    frame: Frame
    record: MaskRecord
    spacing: tuple[float, float]
    object: int | None  # number of the class or object that is asked for
    draw: int


class CaseDataset(Dataset):
    """Cases of a split, in order; with `reading.one` one a class or object of each picture. Batches are lists of them."""

    def __init__(self, records: Sequence[MaskRecord], reading: Reading, pictures: Sequence[Picture] | None, seed: int) -> None:
        self.records, self.reading, self.pictures, self.seed = list(records), reading, pictures, seed
        self.places = [(index, None) for index in range(len(self.records))]
        if reading.one:
            self.places = [(index, int(each)) for index in range(len(self.records)) for each in self._objects(index)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: int) -> Case:
        index, wanted = self.places[key]
        picture = self._picture(index)
        labels = picture.labels
        if wanted is not None:
            labels = (labels == wanted).long()
        elif self.reading.decoding.kind == "instance":
            labels = (labels != 0).long()
        height, width = labels.shape
        frame = Frame.of(height, width, self.reading.size, self.reading.geometry)
        image = picture.image if self.reading.patch is not None else frame.fit(picture.image)
        draw = random.Random(f"{self.seed}/case/{key}").getrandbits(32)
        return Case(self.reading.normalized(image), labels, picture.valid, frame, self.records[index], picture.spacing, wanted, draw)

    def _picture(self, index: int) -> Picture:
        return read_picture(self.records[index], self.reading.decoding) if self.pictures is None else self.pictures[index]

    def _objects(self, index: int) -> list[int]:
        return [each for each in self._picture(index).labels.unique().tolist() if each != 0]
