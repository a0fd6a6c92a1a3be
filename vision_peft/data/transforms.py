"""From a decoded picture to the network's input, in two halves: one that can be kept in memory and one that is random.

`prepare` is deterministic and gives uint8, so that its result can be cached. `finish` draws from the stream it is handed and from
nothing else: which pixels come out depends on that stream's seed alone, not on the worker, the process or what was drawn before.
(The random transforms of torchvision draw from torch's global generator. Saving, seeding and restoring that for every picture costs
0.07 ms, fork_rng 0.28 ms on top of 0.4 ms for the crop; drawing four numbers from a private stream costs nothing to speak of.)
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vision_peft.backbones.base import Preprocess

MIN_RATIO, MAX_RATIO = 3 / 4, 4 / 3  # width over height of a random crop
FLIP = 0.5


class Transform(ABC):
    """A picture's way to the network: `finish(prepare(image), stream)`.

    Attributes:
        random: whether `finish` uses its stream. Where it does not, features of a picture can be computed once and kept.
    """

    random: bool

    def __init__(self, preprocess: Preprocess) -> None:
        self.size = preprocess.size
        self.interpolation = v2.InterpolationMode(preprocess.interpolation)
        self.normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocess.mean, preprocess.std)])

    @abstractmethod
    def prepare(self, image: Image.Image) -> Tensor:
        """uint8 (3, H, W) of an RGB picture."""

    @abstractmethod
    def finish(self, pixels: Tensor, stream: random.Random) -> Tensor:
        """float32 (3, size, size), normalised, from what `prepare` gave; leaves `pixels` as they are."""


class EvalTransform(Transform):
    """Short side to size / crop, centre crop, normalise. Resizing is Pillow's, as in CLIP's and timm's own evaluation."""

    random = False

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__(preprocess)
        short_side = math.floor(preprocess.size / preprocess.crop)
        self.geometry = v2.Compose([v2.Resize(short_side, self.interpolation), v2.CenterCrop(preprocess.size), v2.PILToTensor()])

    def prepare(self, image: Image.Image) -> Tensor:
        return self.geometry(image)

    def finish(self, pixels: Tensor, stream: random.Random) -> Tensor:
        return self.normalise(pixels)


class FlipTransform(EvalTransform):
    """The evaluation transform, mirrored left to right half of the time."""

    random = True

    def finish(self, pixels: Tensor, stream: random.Random) -> Tensor:
        return self.normalise(_flip(pixels, stream))


class CropTransform(Transform):
    """CLIP-LoRA's training transform: a random part of the picture, resized to the input size, mirrored half of the time.

    The crop's area is uniform in [min_scale, 1] of the picture's, its ratio of width to height log-uniform in [3/4, 4/3], its place
    uniform (as torchvision's RandomResizedCrop).

    Args:
        min_scale: smallest share of the area, in (0, 1].
        shrink: pictures whose short side is longer than shrink * size are first shrunk to that, which bounds the memory a kept
            picture takes; the smallest crops lose some sharpness. None crops from the picture as it is on disk, as the paper does.
    """

    random = True

    def __init__(self, preprocess: Preprocess, min_scale: float = 0.08, shrink: float | None = 1.5) -> None:
        super().__init__(preprocess)
        self.min_scale = min_scale
        self.limit = math.inf if shrink is None else round(shrink * preprocess.size)

    def prepare(self, image: Image.Image) -> Tensor:
        if min(image.size) > self.limit:
            image = F.resize(image, [int(self.limit)], interpolation=self.interpolation)
        return F.pil_to_tensor(image)

    def finish(self, pixels: Tensor, stream: random.Random) -> Tensor:
        top, left, height, width = self._box(pixels.shape[-2], pixels.shape[-1], stream)
        size = [self.size, self.size]
        part = F.resized_crop(pixels, top, left, height, width, size, interpolation=self.interpolation, antialias=True)
        return self.normalise(_flip(part, stream))

    def _box(self, height: int, width: int, stream: random.Random) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop of a picture of this height and width, in pixels."""
        for _ in range(10):  # a drawn box may stick out of the picture; draw again
            area = height * width * stream.uniform(self.min_scale, 1)
            ratio = math.exp(stream.uniform(math.log(MIN_RATIO), math.log(MAX_RATIO)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return stream.randint(0, height - h), stream.randint(0, width - w), h, w
        # The picture is long and thin: take the largest centred box whose ratio is allowed.
        h = min(height, max(1, round(width / MIN_RATIO)))
        w = min(width, max(1, round(height * MAX_RATIO)))
        return (height - h) // 2, (width - w) // 2, h, w


def _flip(pixels: Tensor, stream: random.Random) -> Tensor:
    return pixels.flip(-1) if stream.random() < FLIP else pixels


def train_transform(
    augment: Literal["clip_lora", "flip", "none"], preprocess: Preprocess, min_scale: float, shrink: float | None
) -> Transform:
    """The training transform called `augment`; "none" is the evaluation transform."""
    match augment:
        case "clip_lora":
            return CropTransform(preprocess, min_scale, shrink)
        case "flip":
            return FlipTransform(preprocess)
        case "none":
            return EvalTransform(preprocess)
