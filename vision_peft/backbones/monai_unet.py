"""MONAI's U-Net, trained from scratch: what a segmentation network without pretraining reaches, beside the adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vision_peft.backbones.base import Preprocess
from vision_peft.backbones.offline import announce
from vision_peft.backbones.segmentation import Masks, SegmentationBackbone
from vision_peft.engine.site import Site, enumerate_sites
from vision_peft.errors import UserError

START = 0  # seed of its random weights


class UNet(SegmentationBackbone):
    """Has no pretrained weights: train all of it with `adapter.train: ["*"]`. Takes no prompts.

    Args:
        image_size: side of the square input, a multiple of 2 ** (number of channels - 1).
        channels: of each level, from the finest.
        classes: foreground classes of a semantic head; null: one target.
        residual_units: convolutions of a level's residual unit; 0 for plain convolutions.

    Raises:
        UserError: an image size that the levels do not divide.
    """

    def __init__(
        self,
        *,
        image_size: int = 512,
        channels: tuple[int, ...] = (32, 64, 128, 256),
        classes: int | None = None,
        residual_units: int = 2,
    ) -> None:
        super().__init__()
        factor = 2 ** (len(channels) - 1)
        if len(channels) < 2 or image_size % factor:
            raise UserError(f"backbone UNet: image_size {image_size} is not a multiple of {factor}, for {len(channels)} levels")
        self.image_size, self.channels, self.classes, self.residual_units = image_size, tuple(channels), classes, residual_units
        self.num_features = 1 if classes is None else classes + 1
        self.mask_size = (image_size, image_size)
        self.preprocess = Preprocess(image_size, (0.5,) * 3, (0.25,) * 3)
        self._loaded = False
        with torch.device("meta"):
            self.network = self._create()

    def load(self) -> None:
        if self._loaded:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(START)
            self.network = self._create().requires_grad_(False)
        announce("backbone UNet: its weights are random")
        self._loaded = True
        self.train(self.training)

    def sites(self) -> list[Site]:
        return enumerate_sites(self.network, lambda path: f"unet.{path}" if path else "unet")

    def forward(self, images: Tensor) -> Tensor:
        """Mask logits (B, K, S, S), which decode() hands on."""
        return self.network(images)

    def decode(self, embedding: Tensor, prompts: object = None) -> Masks:
        return Masks(embedding)

    def describe(self) -> dict[str, Any]:
        keys = ("image_size", "channels", "classes", "residual_units")
        return {"class": type(self).__name__, "name": "unet", **{key: getattr(self, key) for key in keys}}

    def _create(self) -> nn.Module:
        from monai.networks.nets import UNet as Network  # takes seconds

        strides = (2,) * (len(self.channels) - 1)
        return Network(2, 3, self.num_features, self.channels, strides, num_res_units=self.residual_units)
