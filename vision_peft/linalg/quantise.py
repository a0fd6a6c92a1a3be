"""Uniform quantisation with a learned range, split into residuals of doubling bit widths (Bayesian Bits)."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 4, 8, 16, 32)


def straight_through_round(x: Tensor) -> Tensor:
    """Nearest integers (ties to even), exactly, with the gradient of the identity."""
    return x + (x.round() - x).detach()


def clip_to_range(x: Tensor, limit: Tensor) -> Tensor:
    """x clipped to [-c, c], c just below `limit` > 0, which gets the gradient of what is clipped; so no entry rounds up past the range."""
    c = (1 - 1e-7) * limit
    return torch.clamp(x, -c, c)


def residual_scales(limit: Tensor, count: int) -> list[Tensor]:
    """Steps s_2, s_4, s_8, ... of the signed range [-limit, limit]: s_2 = 2 limit / (2^2 - 1), s_2b = s_b / (2^b + 1).

    Since 2^2b - 1 = (2^b - 1)(2^b + 1), s_b = 2 limit / (2^b - 1): each is the step of plain quantisation with b bits.
    """
    scales = [2 * limit / 3]
    for bits in BITS[: count - 1]:
        scales.append(scales[-1] / (2**bits + 1))
    return scales


def residual_codes(x: Tensor, limit: Tensor, count: int) -> list[Tensor]:
    """x_2 and what 4, 8, ... bits add to it: multiples of the scales whose sum is x, clipped and rounded to the last scale.

    Every code after the first has zero net derivative in x, so any weighted sum has the first one's gradient, straight through.
    """
    rest, codes = clip_to_range(x, limit), []
    for scale in residual_scales(limit, count):
        codes.append(scale * straight_through_round(rest / scale))
        rest = rest - codes[-1]
    return codes


def gated_quantise(x: Tensor, limit: Tensor, gates: Tensor) -> Tensor:
    """x_2 + z_4 (e_4 + z_8 (e_8 + ...)) for gates (k,) = (z_4, z_8, ...); hard gates open up to b bits give plain b-bit quantisation."""
    first, *others = residual_codes(x, limit, len(gates) + 1)
    for weight, code in zip(gates.cumprod(0), others):
        first = first + weight * code
    return first
