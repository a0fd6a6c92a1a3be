"""Frozen random matrices that a seed gives again, and marks by which two draws can be told apart."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Distribution = Literal["uniform", "normal", "ternary"]


def draw(shape: tuple[int, ...], generator: torch.Generator, distribution: Distribution = "uniform", sparsity: float = 3.0) -> Tensor:
    """Independent float32 numbers of mean 0 and variance 1, from a private CPU generator alone.

    Args:
        distribution: `uniform` on (-sqrt(3), sqrt(3)), `normal`, or `ternary`: +-sqrt(sparsity) with probability
            1/(2 sparsity) each, else 0.
        sparsity: of `ternary`, at least 1; one number in `sparsity` is not zero.
    """
    if distribution == "normal":
        return torch.randn(shape, generator=generator, dtype=torch.float32)
    u = torch.rand(shape, generator=generator, dtype=torch.float32)
    if distribution == "uniform":
        return (2 * u - 1) * math.sqrt(3)
    half = 0.5 / sparsity
    return ((u < half).float() - (u >= 1 - half).float()) * math.sqrt(sparsity)


def standardised(tensor: Tensor) -> Tensor:
    """Divided by its root mean square, so that the mean square is exactly 1; zeros stay zeros."""
    return tensor / tensor.square().mean().sqrt().clamp(min=1e-30)


def mark(tensor: Tensor) -> Tensor:
    """Seven float32 numbers of a tensor: angles of three weighted sums of its entries, and the logarithm of its size.

    The sums are taken relative to the size of an entry and wrapped around the circle, so one entry among millions that is off by a
    hundredth of its size changes them by more than loading tolerates, and rounding of the last digit by less.
    """
    flat = tensor.detach().cpu().double().flatten()
    size = flat.square().mean().sqrt().clamp(min=1e-30)
    index = torch.arange(flat.numel(), dtype=torch.float64)
    # weights between 1/2 and 3/2: no entry is left out, and entries that change places are seen
    angles = torch.stack([flat @ (1 + 0.5 * torch.cos(frequency * index + 0.3)) / size for frequency in (1.0, 1.9, 2.4)])
    return torch.cat([angles.cos(), angles.sin(), size.log()[None]]).float()
