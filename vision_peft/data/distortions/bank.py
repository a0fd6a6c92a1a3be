"""Names, levels and functions of the bank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vision_peft.data.distortions import colour, filters, noise, spatial, tone
from vision_peft.errors import UserError, nearest

LEVELS = 5
Function = Callable[[Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class Distortion:
    """One entry.

    Attributes:
        levels: the parameter at levels 1 to 5.
        function: (picture (3, H, W) in [0, 1], parameter, generator) -> the same shape and range.
        official: the released code's function, where it differs.
        severity: whether a higher level is a stronger distortion.
    """

    levels: tuple[float, ...]
    function: Function
    official: Function | None = None
    severity: bool = True


BANK: dict[str, Distortion] = {
    "gaussian_blur": Distortion((0.1, 0.5, 1, 2, 5), filters.gaussian_blur),
    "lens_blur": Distortion((1, 2, 4, 6, 8), filters.lens_blur),
    "colour_diffusion": Distortion((1, 3, 6, 8, 12), colour.diffuse_colours),
    "colour_shift": Distortion((1, 3, 6, 8, 12), colour.shift_colours),
    "saturation_hsv": Distortion((0.4, 0.2, 0.1, 0.0, -0.4), colour.saturate_hsv),
    "saturation_lab": Distortion((1, 2, 3, 6, 9), colour.saturate_lab),
    "jpeg": Distortion((70, 43, 36, 24, 7), noise.jpeg),
    "gaussian_noise": Distortion((0.001, 0.002, 0.003, 0.005, 0.01), noise.gaussian_noise),
    "colour_map_noise": Distortion((0.0001, 0.0005, 0.001, 0.002, 0.003), colour.colour_map_noise),
    "impulse_noise": Distortion((0.001, 0.005, 0.01, 0.02, 0.03), noise.impulse_noise),
    "multiplicative_noise": Distortion((0.001, 0.005, 0.01, 0.02, 0.05), noise.multiplicative_noise),
    "denoise": Distortion((0.001, 0.002, 0.003, 0.005, 0.01), noise.denoised),
    "brighten": Distortion((0.1, 0.2, 0.4, 0.7, 1.1), tone.brighten),
    "darken": Distortion((0.05, 0.1, 0.2, 0.4, 0.8), tone.darken),
    "mean_shift": Distortion((0.15, 0.08, 0.0, -0.08, -0.15), tone.mean_shift, severity=False),
    "resize_bicubic": Distortion((2, 3, 4, 8, 16), spatial.resized_bicubic),
    "high_sharpen": Distortion((1, 2, 3, 6, 12), tone.sharpen, tone.sharpen_official),
    "contrast": Distortion((0.3, 0.15, 0.0, -0.4, -0.6), tone.contrast, severity=False),
    "colour_blocks": Distortion((2, 4, 6, 8, 10), spatial.colour_blocks),
    "pixelate": Distortion((0.01, 0.05, 0.1, 0.2, 0.5), spatial.pixelated),
    "moved_patches": Distortion((20, 40, 60, 80, 100), spatial.moved_patches),
    "jitter": Distortion((0.05, 0.1, 0.2, 0.5, 1), spatial.jittered),
    "resize_bilinear": Distortion((2, 3, 4, 8, 16), spatial.resized_bilinear),
    "resize_nearest": Distortion((2, 3, 4, 5, 6), spatial.resized_nearest),
    "resize_lanczos": Distortion((2, 3, 4, 8, 16), spatial.resized_lanczos),
    "motion_blur": Distortion((12, 16, 20, 24, 28), filters.motion_blur),
}


def distort(
    image: Tensor, name: str, level: int, generator: torch.Generator, variant: Literal["paper", "official"] = "paper"
) -> Tensor:
    """A distorted copy of a picture (3, H, W), float32 in [0, 1]; all draws come from the generator.

    Raises:
        UserError: a name that is not in the bank, or a level that is not 1 to 5.
    """
    if name not in BANK:
        raise UserError(f"unknown distortion {name!r}{nearest(name, BANK)}")
    if not 1 <= level <= LEVELS:
        raise UserError(f"distortion level {level} is not from 1 to {LEVELS}")
    entry = BANK[name]
    function = entry.official if variant == "official" and entry.official is not None else entry.function
    return function(image, entry.levels[level - 1], generator)
