"""Colour spaces of pictures (3, H, W), sRGB in [0, 1] under D65, and what distorts colours in them."""

from __future__ import annotations

import torch
from torch import Tensor

from vision_peft.data.distortions.filters import gaussian, translate

WHITE = (0.95047, 1.0, 1.08883)
RGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
RGB_TO_YCC = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))  # BT.601, of [0, 1], to 16..235 and 16..240
YCC_OFFSET = (16.0, 128.0, 128.0)
EDGE = 6 / 29


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """CIELab: L in [0, 100], a and b around [-110, 110]."""
    linear = torch.where(rgb > 0.04045, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = _mixed(RGB_TO_XYZ, linear) / _column(WHITE, rgb)
    f = torch.where(xyz > EDGE**3, xyz.clamp(min=1e-8) ** (1 / 3), xyz / (3 * EDGE**2) + 4 / 29)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def lab_to_rgb(lab: Tensor) -> Tensor:
    """The inverse of rgb_to_lab, clipped to [0, 1]."""
    y = (lab[0] + 16) / 116
    f = torch.stack([y + lab[1] / 500, y, y - lab[2] / 200])
    xyz = torch.where(f > EDGE, f**3, 3 * EDGE**2 * (f - 4 / 29)) * _column(WHITE, lab)
    linear = _mixed(torch.tensor(RGB_TO_XYZ, dtype=torch.float64).inverse().tolist(), xyz)
    rgb = torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=1e-8) ** (1 / 2.4) - 0.055, 12.92 * linear)
    return rgb.clamp(0, 1)


def rgb_to_hsv(rgb: Tensor) -> Tensor:
    """Hue in [0, 6), saturation and value in [0, 1]."""
    value, place = rgb.max(0)
    spread = value - rgb.min(0).values
    safe = spread.clamp(min=1e-8)
    red, green, blue = rgb
    hues = torch.stack([((green - blue) / safe) % 6, (blue - red) / safe + 2, (red - green) / safe + 4])
    hue = hues.gather(0, place[None])[0]
    return torch.stack([torch.where(spread > 0, hue, torch.zeros_like(hue)), spread / value.clamp(min=1e-8), value])


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """The inverse of rgb_to_hsv, clipped to [0, 1]."""
    hue, saturation, value = hsv
    wheel = [(offset + hue) % 6 for offset in (5, 3, 1)]
    return torch.stack([value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1) for k in wheel]).clamp(0, 1)


def diffuse_colours(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """a, b <- s Gaussian(a, b; 1.5 s + 2) in Lab."""
    lab = rgb_to_lab(image)
    return lab_to_rgb(torch.cat([lab[:1], strength * gaussian(lab[1:], 1.5 * strength + 2)]))


def shift_colours(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The green channel moves by up to s pixels, at edges only."""
    direction = torch.randn(2, generator=generator).abs()
    y, x = (strength * direction / direction.norm()).round().int().tolist()
    edges = _edges(image)
    moved = translate(image[1:2], y, x)[0]
    return torch.stack([image[0], edges * moved + (1 - edges) * image[1], image[2]])


def saturate_hsv(image: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    hsv = rgb_to_hsv(image)
    return hsv_to_rgb(torch.stack([hsv[0], hsv[1] * factor, hsv[2]]))


def saturate_lab(image: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    lab = rgb_to_lab(image)
    return lab_to_rgb(torch.cat([lab[:1], factor * lab[1:]]))


def colour_map_noise(image: Tensor, variance: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise in YCbCr / 255."""
    matrix, offset = torch.tensor(RGB_TO_YCC) / 255, torch.tensor(YCC_OFFSET)[:, None, None] / 255
    ycc = torch.einsum("ij,jhw->ihw", matrix, image) + offset
    noisy = ycc + variance**0.5 * torch.randn(ycc.shape, generator=generator)
    return torch.einsum("ij,jhw->ihw", matrix.inverse(), noisy - offset).clamp(0, 1)


def _edges(image: Tensor) -> Tensor:
    """(H, W) in [0, 1]: where brightness changes."""
    grey = image.mean(0)
    rows, columns = torch.gradient(grey)
    mask = _stretched(gaussian((rows.square() + columns.square()).sqrt()[None], 4.0)[0])
    mask = _stretched(torch.where(mask < 0.1, torch.zeros_like(mask), mask))
    sample = mask.flatten()[:: max(1, mask.numel() // 1_000_000)]  # torch's quantile takes 16 million values at most
    low, high = torch.quantile(sample, torch.tensor([0.01, 0.99]))
    return _stretched(mask.clamp(low, high))


def _stretched(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-8)


def _mixed(matrix: object, channels: Tensor) -> Tensor:
    return torch.einsum("ij,jhw->ihw", torch.tensor(matrix, dtype=channels.dtype), channels)


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype)[:, None, None]
