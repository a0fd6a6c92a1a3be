"""Blurs and sharpening of pictures (C, H, W) in [0, 1]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(image: Tensor, kernel: Tensor, mode: str = "replicate") -> Tensor:
    """Every channel by one kernel (kh, kw) of odd sides; borders are padded."""
    kh, kw = kernel.shape
    padded = F.pad(image[None], (kw // 2, kw // 2, kh // 2, kh // 2), mode=mode)[0]
    return F.conv2d(padded[:, None], kernel[None, None].to(image.dtype))[:, 0]


def gaussian(image: Tensor, sigma: float) -> Tensor:
    """Blurred by a Gaussian cut at four deviations; nothing happens where it is narrower than half a pixel's neighbour would notice."""
    reach = math.ceil(4 * sigma)
    places = torch.arange(-reach, reach + 1, dtype=image.dtype)
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    weights = weights / weights.sum()
    return convolve(convolve(image, weights[None]), weights[:, None])


def translate(image: Tensor, y: int, x: int) -> Tensor:
    """Moved down by y and to the right by x pixels; what comes in mirrors the border."""
    height, width = image.shape[-2:]

    def mirrored(length: int, by: int) -> Tensor:
        places = (torch.arange(length) - by) % (2 * length)
        return torch.where(places < length, places, 2 * length - 1 - places)

    return image[:, mirrored(height, y)][:, :, mirrored(width, x)]


def gaussian_blur(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    return gaussian(image, sigma)


def lens_blur(image: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    """A disk whose edge pixels weigh as much as they are covered."""
    reach, fine = math.ceil(radius), 9
    places = (torch.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5
    inside = (places[:, None] ** 2 + places[None] ** 2 <= radius**2).float()
    kernel = F.avg_pool2d(inside[None, None], fine)[0, 0]
    return convolve(image, kernel / kernel.sum())


def motion_blur(image: Tensor, length: float, generator: torch.Generator) -> Tensor:
    """A horizontal or a vertical line, by chance."""
    kernel = torch.ones(1, int(length) + 1 - int(length) % 2)
    kernel = kernel / kernel.sum()
    return convolve(image, kernel if torch.rand((), generator=generator) < 0.5 else kernel.T)


def box_blur(image: Tensor, reach: int) -> Tensor:
    side = 2 * reach + 1
    return convolve(image, torch.full((side, side), 1 / side**2))


def laplacian(plane: Tensor) -> Tensor:
    """Second central differences of (1, H, W) in both directions, summed."""
    return convolve(plane, torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]))
