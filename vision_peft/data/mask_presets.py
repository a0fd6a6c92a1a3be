"""How the well-known SAM tools bring a picture to the network; every choice can be overridden in the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vision_peft.data.geometry import GeometryName
from vision_peft.data.intensity import IntensityName
from vision_peft.data.mask_augment import AugmentName

NormalizeName = Literal["backbone", "sam", "none", "salt_official"]
PresetName = Literal["default", "salt", "samed", "medsam", "sammed2d"]


@dataclass(frozen=True)
class Preset:
    """Of data.geometry, data.intensity, data.normalize, data.augment; `window` is (centre, width) in Hounsfield units."""

    geometry: GeometryName = "pad"
    intensity: IntensityName = "none"
    normalize: NormalizeName = "backbone"
    augment: AugmentName = "default"
    window: tuple[float, float] = (40.0, 400.0)


PRESETS: dict[str, Preset] = {
    "default": Preset(),
    "salt": Preset(intensity="minmax", normalize="sam", augment="salt"),
    "samed": Preset("squash", "window", "none", "samed", window=(75.0, 400.0)),
    "medsam": Preset("squash", "percentile", "none", "flip"),
    "sammed2d": Preset("centre", "none", "sam", "none"),
}

SAM = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # mean and deviation of 0..255
NORMALIZATIONS = {
    "sam": SAM,
    "salt_official": (SAM[0], (53.395, *SAM[1][1:])),  # the released code's red deviation, a misprint of SAM's
    "none": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
}
