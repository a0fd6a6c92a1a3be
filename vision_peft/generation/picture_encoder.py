"""Frozen image encoders that tell how near pictures are: unit features of pictures in [-1, 1], differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.backbones.base import Backbone


class PictureEncoder(nn.Module):
    """Any backbone with features of images (Vit, Clip, DualEncoder) behind one differentiable way of resizing.

    References and generated pictures pass the same way: another resampling would be a direction of its own in the features.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone.eval()
        self.size = backbone.preprocess.size
        mean, std = (torch.tensor(each)[:, None, None] for each in (backbone.preprocess.mean, backbone.preprocess.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def train(self, mode: bool = True) -> PictureEncoder:
        """Always in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Unit features (B, d) in float32 of pictures (B, 3, H, W) in [-1, 1]; those outside are taken as they are."""
        unit = images.float() / 2 + 0.5
        if unit.shape[-2:] != (self.size, self.size):
            unit = F.interpolate(unit, (self.size, self.size), mode="bicubic", antialias=True)
        with torch.autocast(unit.device.type, enabled=False):  # what counts are small differences of near-equal features
            features = self.backbone((unit - self.mean) / self.std)
        return F.normalize(features.float(), dim=1)

    @torch.no_grad()
    def many(self, images: Tensor, batch: int = 32) -> Tensor:
        """The same of many pictures (N, 3, H, W), without gradient; (0, d) for none."""
        device = self.mean.device
        parts = [self(part.to(device)).cpu() for part in images.split(batch)] if len(images) else []
        return torch.cat(parts) if parts else torch.zeros(0, self.backbone.num_features)
