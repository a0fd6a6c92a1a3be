"""Noise, and what compression and denoising leave of it, on pictures (3, H, W) in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from vision_peft.data.distortions.filters import box_blur, gaussian


def gaussian_noise(image: Tensor, variance: float, generator: torch.Generator) -> Tensor:
    return (image + variance**0.5 * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def multiplicative_noise(image: Tensor, variance: float, generator: torch.Generator) -> Tensor:
    return (image + variance**0.5 * image * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def impulse_noise(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the pixels is black or white."""
    u = torch.rand(image.shape[1:], generator=generator)
    return image.masked_fill(u < share / 2, 0.0).masked_fill(u > 1 - share / 2, 1.0)


def denoised(image: Tensor, variance: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise, then a Gaussian blur of deviation 3 or a box of 5 x 5 pixels, by chance."""
    noisy = gaussian_noise(image, variance, generator)
    return gaussian(noisy, 3.0) if torch.rand((), generator=generator) < 0.5 else box_blur(noisy, 2)


def jpeg(image: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    packed = encode_jpeg((image * 255).round().to(torch.uint8), quality=int(quality))
    return decode_jpeg(packed).to(image.dtype) / 255
