"""Brightness and contrast of pictures (3, H, W) in [0, 1], and sharpening, which acts on brightness alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vision_peft.data.distortions.colour import lab_to_rgb, rgb_to_lab
from vision_peft.data.distortions.filters import laplacian


def brighten(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """(2 c(RGB) + Lab with L <- c(L)) / 3, c the parabola through (0, 0), (1/2, 1/2 + amount / 2), (1, 1)."""
    lab = rgb_to_lab(image)
    light = 100 * _parabola(lab[:1] / 100, amount)
    return (2 * _parabola(image, amount) + lab_to_rgb(torch.cat([light, lab[1:]]))) / 3


def darken(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """The parabola through (0, 0), (1/2, 1/2 - amount / 2), (1, 1)."""
    return _parabola(image, -amount)


def mean_shift(image: Tensor, offset: float, generator: torch.Generator) -> Tensor:
    return (image + offset).clamp(0, 1)


def contrast(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """The least-squares cubic through (0, 0), (0.3, 1/4 - amount / 4), (1/2, 1/2), (0.7, 3/4 + amount / 4), (1, 1)."""
    x, y = [0, 0.3, 0.5, 0.7, 1], [0, 0.25 - amount / 4, 0.5, 0.75 + amount / 4, 1]
    cubic, square, slope, offset = (float(each) for each in np.polyfit(x, y, 3))
    return (((cubic * image + square) * image + slope) * image + offset).clamp(0, 1)


def sharpen(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """L <- L - amount laplacian(L)."""
    lab = rgb_to_lab(image)
    return lab_to_rgb(torch.cat([(lab[:1] - amount * laplacian(lab[:1])).clamp(0, 100), lab[1:]]))


def sharpen_official(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """As the released code: values of 0 to 255 are read as if they were in [0, 1], which ruins the picture alike at every amount."""
    return sharpen(image * 255, amount, generator)


def _parabola(x: Tensor, amount: float) -> Tensor:
    return (x + 2 * amount * x * (1 - x)).clamp(0, 1)
