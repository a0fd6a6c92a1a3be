"""Random starts drawn from private generators on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kaiming_rows_(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a matrix (rows, in) with U(-1/sqrt(in), 1/sqrt(in)), Kaiming's uniform start with a = sqrt(5); the same on every device."""
    bound = 1 / math.sqrt(tensor.shape[-1])
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float32) * (2 * bound) - bound
    return tensor.copy_(drawn)
