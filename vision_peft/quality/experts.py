"""The two experts of a quality model: frozen encoders whose features of a picture at full and at half size stand side by side.

    f(X) = [e_1(X), e_1(X / 2), e_2(X), e_2(X / 2), ...]

X is the whole picture at its own resolution, because resizing changes quality; X / 2 is Pillow's bicubic reduction of both sides.
Source: Saha, Mishra, Bovik, "Re-IQA: Unsupervised Learning for Image Quality Assessment in the Wild", CVPR 2023; avinabsaha/ReIQA.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vision_peft.backbones.vit import Vit
from vision_peft.engine.fingerprint import fingerprint
from vision_peft.errors import UserError

SMALLEST = 32  # pixels of the half-size picture's shorter side


class Expert:
    """One encoder by its timm or `offline:` name, with the mean of a transformer's patch tokens or a convolutional network's own pool.

    Attributes:
        patch: sides are cut to a multiple of it, in the middle; 1 for convolutional networks.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        backbone = Vit(name)
        if backbone.is_transformer:
            backbone = Vit(name, pool="avg", dynamic=True)
        backbone.load()
        self.name, self.device = name, device
        self.backbone = backbone.eval().to(device)
        self.patch = backbone.network.patch_embed.patch_size[0] if backbone.is_transformer else 1
        self.width = backbone.num_features
        preprocess = backbone.preprocess
        self.mean, self.std = (torch.tensor(each)[:, None, None] for each in (preprocess.mean, preprocess.std))

    def describe(self) -> dict[str, object]:
        """What a regressor must be used with."""
        return {"name": self.name, "width": self.width, "fingerprint": fingerprint(self.backbone.network, self.backbone.resized)}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, width) of pictures (B, 3, H, W) in [0, 1]."""
        height, width = (side // self.patch * self.patch for side in images.shape[-2:])
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        inside = images[..., top : top + height, left : left + width]
        return self.backbone(((inside - self.mean) / self.std).to(self.device)).float().cpu()


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
