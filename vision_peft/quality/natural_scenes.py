"""A classical expert: statistics that undistorted photographs share and distortions change (BRISQUE), without any learned weight.

Divided by its local contrast, the luminance of a natural photograph is close to Gaussian, and neighbours are correlated in a regular way;
blur makes the distribution more peaked, noise less (beyond a Gaussian), compression changes the neighbours. With I the luminance on
0..255 and w the 7 x 7 Gaussian window of deviation 7/6,

    mu = w * I,   sigma = sqrt(w * I^2 - mu^2),   M = (I - mu) / (sigma + 1)                                  (H, W), "MSCN"
    f = [GGD(M), AGGD(M M_right), AGGD(M M_below), AGGD(M M_below-right), AGGD(M M_above-right)]              2 + 4 * 4 = 18

where GGD gives shape and variance, AGGD gives shape, mean and the variances left and right of zero (see the fits). That is one scale:
an expert is called on the picture and on its half, which makes BRISQUE's 36 numbers.
Borders are as in the authors' release: zeros outside for w, and the last column's right neighbour is the first column.
Sources: Mittal, Moorthy, Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE TIP 2012, and its MATLAB release;
the fits are those of Sharifi and Leon-Garcia, IEEE TCSVT 1995, and Lasmar, Stitou, Berthoumieu, ICIP 2009.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LUMINANCE = (0.299, 0.587, 0.114)  # BT.601, as MATLAB's rgb2gray, without its rounding to whole levels
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (-1, 1))  # rows and columns that a copy of M is moved by
RADIUS, DEVIATION = 3, 7 / 6
ROUND_OFF = 1e-9  # M of a flat area differs from 0 by about 1e-13; where pixels of 8 bits differ at all, by 1e-7 or more
TINY = torch.finfo(torch.float64).tiny


def _moments_ratio(shape: Tensor) -> Tensor:
    """E|x|^2 / E x^2 of a generalised Gaussian: G(2/a)^2 / (G(1/a) G(3/a)), which increases with the shape a, to 3/4."""
    return torch.exp(2 * torch.lgamma(2 / shape) - torch.lgamma(1 / shape) - torch.lgamma(3 / shape))


SHAPES = torch.arange(200, 10_001, dtype=torch.float64) / 1000  # the authors' grid
RATIOS = _moments_ratio(SHAPES)


class NaturalScenes:
    """An Expert (see experts) of width 18; needs no weights and no device."""

    name, width = "classical:brisque", 2 + 4 * len(NEIGHBOURS)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "width": self.width, "fingerprint": "brisque-1"}  # to be raised when numbers change

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 18) float32 of (B, 3, H, W) in [0, 1]; finite for every picture, a black one too (see the fits)."""
        found = mscn(luminance(images))
        # One product at a time: four at once would be the memory's peak with large pictures.
        products = (found * found.roll(shift, (-2, -1)) for shift in NEIGHBOURS)
        return torch.cat([fit_symmetric(found), *(fit_asymmetric(product) for product in products)], 1).float()


def luminance(images: Tensor) -> Tensor:
    """(B, H, W) on 0..255 in float64: float32's rounding of w * I^2 in bright areas is not small beside a flat area's variance."""
    return sum(255 * weight * images[:, channel].double() for channel, weight in enumerate(LUMINANCE))


def mscn(values: Tensor) -> Tensor:
    """M (B, H, W): mean-subtracted, contrast-normalised luminance."""
    mean = _smooth(values)
    deviation = (_smooth(values**2) - mean**2).clamp_(min=0).sqrt_()
    # The asymmetric fit counts signs, which round-off draws in a flat area (in the authors' release too): there M is set to its true 0.
    return torch.nn.functional.hardshrink((values - mean) / (deviation + 1), ROUND_OFF)


def _smooth(values: Tensor) -> Tensor:
    """w * values (B, H, W), zeros outside; the window is a product of a column and a row."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64)
    window = torch.exp(-(offsets**2) / (2 * DEVIATION**2))
    window /= window.sum()
    for axis in (1, 2):
        length = values.shape[axis]
        padded = torch.nn.functional.pad(values, (0, 0, RADIUS, RADIUS) if axis == 1 else (RADIUS, RADIUS))
        values = sum(weight * padded.narrow(axis, start, length) for start, weight in enumerate(window.tolist()))
    return values


def fit_symmetric(samples: Tensor) -> Tensor:
    """Shape a and variance (B, 2) of p(x) ~ exp(-|x / b|^a) from samples (B, ...), by E|x|^2 / E x^2.

    Samples that are all 0, a black picture's, have variance 0 and the least shape, 0.2: blur without end makes a picture that.
    """
    samples = samples.flatten(1)
    variance = (samples**2).mean(1)
    return torch.stack([_shape(samples.abs().mean(1) ** 2 / variance.clamp(min=TINY)), variance], 1)


def fit_asymmetric(samples: Tensor) -> Tensor:
    """Shape, mean, left and right variance (B, 4) of a density whose halves are exp(-(-x / b_l)^a) and exp(-(x / b_r)^a).

    With l^2 = E[x^2 | x < 0], r^2 = E[x^2 | x > 0]: the ratio of a's symmetric density is E|x|^2 / E x^2 * (l^3 + r^3)(l + r) /
    (l^2 + r^2)^2, b = deviation * sqrt(G(1/a) / G(3/a)), mean = (b_r - b_l) G(2/a) / G(1/a). A side without samples has variance 0.
    """
    samples = samples.flatten(1)
    squares = torch.stack([_mean_square(samples.clamp(max=0)), _mean_square(samples.clamp(min=0))], 1)  # (B, 2)
    left, right = squares.sqrt().unbind(1)
    skew = (left**3 + right**3) * (left + right) / (squares.sum(1) ** 2).clamp(min=TINY)
    shape = _shape(skew * samples.abs().mean(1) ** 2 / (samples**2).mean(1).clamp(min=TINY))
    # sqrt(ratio) is G(2/a) / sqrt(G(1/a) G(3/a)): what the mean needs.
    mean = (right - left) * _moments_ratio(shape).sqrt()
    return torch.stack([shape, mean, *squares.unbind(1)], 1)


def _mean_square(side: Tensor) -> Tensor:
    """(B,) over what is not 0 of (B, N)."""
    return (side**2).sum(1) / side.count_nonzero(1).clamp(min=1)


def _shape(ratio: Tensor) -> Tensor:
    """(B,) shapes whose moments' ratio is given, within 0.2..10.

    The grid is interpolated instead of its nearest entry taken: features do not jump by 0.001 when a picture changes by round-off.
    """
    upper = torch.searchsorted(RATIOS, ratio).clamp(1, len(RATIOS) - 1)
    low, high = RATIOS[upper - 1], RATIOS[upper]
    return torch.lerp(SHAPES[upper - 1], SHAPES[upper], ((ratio - low) / (high - low)).clamp(0, 1))
