"""From a picture's own numbers to [0, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from vision_peft.data.pixels import Pixels
from vision_peft.errors import UserError

IntensityName = Literal["none", "minmax", "percentile", "window"]


def to_unit(pixels: Pixels, intensity: IntensityName, window: tuple[float, float], path: Path) -> np.ndarray:
    """float32 (H, W, 3) in [0, 1].

    Args:
        intensity: `none` takes pictures as they are; `minmax` stretches each to its own range (SALT); `percentile` to the 0.5th to
            99.5th percentile of what is not zero (MedSAM); `window` to (centre, width) in the scanner's units (CT).

    Raises:
        UserError: a choice that these values cannot take; names the file and the key.
    """
    values = pixels.values
    if intensity == "none":
        if pixels.measured:
            raise UserError(f"{path}: holds the scanner's own units; set data.intensity to minmax, percentile or window")
        return values
    if intensity == "window":
        if not pixels.measured:
            raise UserError(f"{path}: data.intensity: window counts in the scanner's units, which this picture has not; use none or minmax")
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    elif intensity == "percentile":
        inside = values[values != 0]
        low, high = np.percentile(inside, [0.5, 99.5]) if inside.size else (0.0, 1.0)
    else:
        low, high = float(values.min()), float(values.max())
    return np.clip((values - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)  # a constant picture becomes 0
