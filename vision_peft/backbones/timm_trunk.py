"""A timm network as SAM's image encoder: features of several depths side by side, then SAM's neck."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn


class TimmEncoder(nn.Module):
    """A chain of two steps: the trunk, the neck.

    Args:
        trunk: offers timm's forward_intermediates.
        levels: which of its intermediate features; all are resized to the grid of the finest.
        image_size: side of the square input.
        width: channels of the embedding.
    """

    steps = 2

    def __init__(self, trunk: nn.Module, levels: Sequence[int], image_size: int, width: int) -> None:
        super().__init__()
        self.trunk, self.levels = trunk, list(levels)
        meta = next(trunk.parameters()).device.type == "meta"
        images = torch.zeros(1, 3, image_size, image_size, device="meta" if meta else "cpu")
        with torch.no_grad():
            shapes = [tuple(each.shape[1:]) for each in self._intermediates(images)]  # (C, h, w)
        self.grid = max(shape[1:] for shape in shapes)
        channels = sum(shape[0] for shape in shapes)
        self.neck = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            LayerNorm2d(width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            LayerNorm2d(width),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images, 0, self.steps)

    def start(self, images: Tensor) -> Tensor:
        return images

    def run(self, x: Tensor, first: int, last: int) -> Tensor:
        """Steps first to last - 1: 0 is the trunk, 1 the neck."""
        if first == 0 and last > 0:
            x = torch.cat([_resized(each, self.grid) for each in self._intermediates(x)], 1)
        return self.neck(x) if first < 2 == last else x

    def step_of(self, path: str) -> int:
        """Index of the step that owns the parameter with this path from the encoder."""
        return int(path.startswith("neck."))

    def _intermediates(self, images: Tensor) -> list[Tensor]:
        return self.trunk.forward_intermediates(images, indices=self.levels, intermediates_only=True, output_fmt="NCHW")


def _resized(features: Tensor, grid: tuple[int, int]) -> Tensor:
    return features if features.shape[-2:] == grid else F.interpolate(features, grid, mode="bilinear", align_corners=False)
