"""How a picture of any size becomes the square that a network takes, and the way back: exact in size and place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GeometryName = Literal["pad", "squash", "centre"]


@dataclass(frozen=True)
class Frame:
    """Where a picture of (height, width) lies in a square of `side`: resized to (rows, columns), its corner at (top, left).

    `pad`: the longer side fills the square, what is left is padded below and to the right (SAM). `squash`: both sides fill it (SAMed,
    MedSAM). `centre`: a picture smaller than the square keeps its size and is padded around, another is squashed (SAM-Med2D).
    """

    height: int
    width: int
    side: int
    rows: int
    columns: int
    top: int = 0
    left: int = 0

    @classmethod
    def of(cls, height: int, width: int, side: int, geometry: GeometryName) -> Frame:
        if geometry == "pad":
            scale = side / max(height, width)
            return cls(height, width, side, max(1, round(height * scale)), max(1, round(width * scale)))
        if geometry == "centre" and max(height, width) < side:
            return cls(height, width, side, height, width, (side - height) // 2, (side - width) // 2)
        return cls(height, width, side, side, side)

    def fit(self, image: Tensor, labels: bool = False) -> Tensor:
        """(C, H, W) -> (C, side, side); labels take the nearest pixel, the rest is zero."""
        resized = self._resized(image[None].float(), (self.rows, self.columns), labels)[0]
        below, right = self.side - self.top - self.rows, self.side - self.left - self.columns
        return F.pad(resized, (self.left, right, self.top, below)).to(image.dtype)

    def restore(self, scores: Tensor) -> Tensor:
        """Scores (K, h, w) over the whole square, of any resolution -> (K, H, W) of the picture, without the padding."""
        whole = self._resized(scores[None].float(), (self.side, self.side), False, smooth=False)[0]
        inside = whole[:, self.top : self.top + self.rows, self.left : self.left + self.columns]
        return self._resized(inside[None], (self.height, self.width), False, smooth=False)[0]

    def points(self, xy: Tensor) -> Tensor:
        """Pixel centres (..., 2) as x, y of the picture -> of the square."""
        scale = torch.tensor([self.columns / self.width, self.rows / self.height])
        return (xy + 0.5) * scale - 0.5 + torch.tensor([self.left, self.top])

    def points_back(self, xy: Tensor) -> Tensor:
        """The inverse of points()."""
        scale = torch.tensor([self.columns / self.width, self.rows / self.height])
        return (xy - torch.tensor([self.left, self.top]) + 0.5) / scale - 0.5

    @staticmethod
    def _resized(image: Tensor, size: tuple[int, int], labels: bool, smooth: bool = True) -> Tensor:
        if tuple(image.shape[-2:]) == size:
            return image
        if labels:
            return F.interpolate(image, size, mode="nearest-exact")
        # antialias: shrinking by plain interpolation would pass over thin structures
        return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=smooth)
