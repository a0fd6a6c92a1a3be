"""The two experts of a quality model: frozen encoders whose features of a picture at full and at half size stand side by side.

    f(X) = [e_1(X), e_1(X / 2), e_2(X), e_2(X / 2), ...]

X is the whole picture at its own resolution, because resizing changes quality; X / 2 is Pillow's bicubic reduction of both sides.
Source: Saha, Mishra, Bovik, "Re-IQA: Unsupervised Learning for Image Quality Assessment in the Wild", CVPR 2023; avinabsaha/ReIQA.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vision_peft.backbones import encoder_folder
from vision_peft.backbones.vit import Vit
from vision_peft.engine import store
from vision_peft.engine.fingerprint import fingerprint
from vision_peft.engine.install import merge
from vision_peft.engine.precision import cpu_has_bfloat16
from vision_peft.errors import UserError
from vision_peft.quality.natural_scenes import NaturalScenes

SMALLEST = 32  # pixels of the half-size picture's shorter side
LARGEST = 2**23  # pixels at once, without tiles: a frame of 4K; memory grows with pixels, a transformer's time with their square
RANDOM = "random:"


class Expert(Protocol):
    """Attributes:
        name: what open_expert() was given.
        width: of a feature.
    """

    name: str
    width: int

    def describe(self) -> dict[str, Any]:
        """`name`, `width` and the `fingerprint` of all numbers that features depend on: what a regressor must be used with."""

    def __call__(self, images: Tensor) -> Tensor:
        """(B, width) of pictures (B, 3, H, W) in [0, 1]."""


class Encoder:
    """An image encoder as an expert: the mean of a transformer's patch tokens or a convolutional network's own pool.

    Args:
        mean, std: of its input, which an encoder that was trained on [0, 1] has as 0 and 1.
        marks: the fingerprint.
        tile: side in pixels above which a picture passes in tiles, whose features are averaged by area: bounds the memory that a large
            picture takes, and changes the numbers a little (what lies across a seam is seen by halves).
        bf16: compute under bfloat16 autocast: faster on processors that have it (transformers 2.5 times). Features differ by 1 to 6 %,
            and agree with opinions as well (docs/results_quality.md).
    """

    def __init__(
        self, name: str, backbone: Vit, mean: Sequence[float], std: Sequence[float], marks: str, tile: int | None = None,
        bf16: bool = False, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.name, self.device, self.width, self.marks = name, device, backbone.num_features, marks
        self.tile, self.bf16 = tile, bf16
        if bf16 and device == "cpu" and not cpu_has_bfloat16():
            warnings.warn(f"bf16: {name}: this processor has no bfloat16 instructions and takes many times as long", stacklevel=2)
        self.backbone = backbone.eval().to(device)
        self.patch = backbone.network.patch_embed.patch_size[0] if backbone.is_transformer else 1
        self.mean, self.std = (torch.tensor(each)[:, None, None] for each in (mean, std))

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "width": self.width, "fingerprint": self.marks, "tile": self.tile, "bf16": self.bf16}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Sides are cut to a multiple of the patches, in the middle. UserError for a picture that needs tiles."""
        height, width = images.shape[-2:]
        if self.tile is None and height * width > LARGEST:
            raise UserError(f"is {width} x {height} pixels; above {LARGEST >> 20} megapixels it must pass in tiles, e.g. --tile 1024")
        rows, columns = (_pieces(length, self.patch, self.tile) for length in images.shape[-2:])
        found, area = torch.zeros(len(images), self.width), 0
        for top, bottom in rows:
            for left, right in columns:
                piece = (images[..., top:bottom, left:right] - self.mean) / self.std
                with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                    found += self.backbone(piece.to(self.device)).float().cpu() * (bottom - top) * (right - left)
                area += (bottom - top) * (right - left)
        return found / area


def _pieces(length: int, patch: int, tile: int | None) -> list[tuple[int, int]]:
    """Beginnings and ends that divide a side, cut to whole patches, as evenly as whole patches allow."""
    patches = length // patch
    start = (length - patches * patch) // 2
    count = 1 if tile is None else -(-length // tile)
    ends = [start + patch * (patches * index // count) for index in range(count + 1)]
    return list(pairwise(ends))


def open_expert(name: str, tile: int | None = None, bf16: bool = False) -> Expert:
    """By a timm or `offline:` name, `random:NAME` (its weights drawn at random), an adapter folder, an encoder's folder, or
    `classical:brisque`, which `tile` and `bf16` are nothing to.

    Raises:
        UserError: names what is unknown, missing or does not fit.
    """
    if name == NaturalScenes.name:
        return NaturalScenes()
    options = {"tile": tile, "bf16": bf16}
    folder = Path(name)
    if (folder / store.CONFIG).is_file():
        return _adapted(name, folder, options)
    if (folder / encoder_folder.CONFIG).is_file():
        backbone, facts = encoder_folder.load_encoder(folder, dynamic=True)
        return Encoder(name, backbone, **_input(backbone, facts), marks=_marks(backbone), **options)
    if folder.is_dir():
        raise UserError(f"--experts: {folder} holds neither {store.CONFIG} nor {encoder_folder.CONFIG}: no adapter and no encoder")
    if name.startswith(RANDOM):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone = _whole_pictures(name.removeprefix(RANDOM), pretrained=False)
    else:
        backbone = _whole_pictures(name)
    return Encoder(name, backbone, **_input(backbone, {}), marks=_marks(backbone), **options)


def _adapted(name: str, folder: Path, options: dict[str, Any]) -> Encoder:
    config = store.read_config(folder)
    described = config["backbone"]
    if described.get("class") != Vit.__name__:
        raise UserError(f"{folder}: adapts a {described.get('class')}; experts are image encoders (Vit)")
    arguments = {key: described[key] for key in ("image_size", "depth", "pool", "weights", "pretrained")}
    backbone = _whole_pictures(described["name"], **arguments)
    adapters = store.load_adapter(backbone.network, folder, sites=backbone.sites(), resized=backbone.resized)
    adapters.eval()
    if adapters.method.merge == "exact":
        merge(backbone.network)
    weights = hashlib.sha256((folder / store.WEIGHTS).read_bytes()).hexdigest()
    marks = hashlib.sha256(f"{described['fingerprint']}{config['method']}{config['seed']}{weights}".encode()).hexdigest()
    return Encoder(name, backbone, **_input(backbone, config), marks=marks, **options)


def _whole_pictures(name: str, **arguments: Any) -> Vit:
    """Loaded, and fit for pictures of any size; a transformer whose pooling is not said gives the mean of its patch tokens."""
    backbone = Vit(name, **arguments)
    if backbone.is_transformer:
        pool = arguments.get("pool", "avg")
        backbone = Vit(name, **{**arguments, "pool": pool, "dynamic": True})
    backbone.load()
    return backbone


def _input(backbone: Vit, facts: dict[str, Any]) -> dict[str, Sequence[float]]:
    """Mean and std as training had them, or as the pretrained network's."""
    return facts.get("input") or {"mean": backbone.preprocess.mean, "std": backbone.preprocess.std}


def _marks(backbone: Vit) -> str:
    return fingerprint(backbone.network, backbone.resized)


def features(experts: Sequence[Expert], pictures: Sequence[Image.Image]) -> np.ndarray:
    """float32 (B, 2 * sum of widths) of RGB pictures of one size.

    Raises:
        UserError: a picture whose half is smaller than 32 pixels.
    """
    width, height = pictures[0].size
    if min(width, height) // 2 < SMALLEST:
        raise UserError(f"is {width} x {height} pixels; quality needs at least {2 * SMALLEST} on the shorter side")
    halves = [picture.resize((width // 2, height // 2), Image.Resampling.BICUBIC) for picture in pictures]
    whole, half = (torch.stack([_unit(picture) for picture in each]) for each in (pictures, halves))
    return torch.cat([part for expert in experts for part in (expert(whole), expert(half))], 1).numpy()


def _unit(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, np.float32).copy()).permute(2, 0, 1) / 255
