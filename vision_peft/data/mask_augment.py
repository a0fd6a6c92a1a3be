"""Random changes of a picture together with its masks, by MONAI; all draws follow from one number."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

AugmentName = Literal["default", "flip", "salt", "samed", "none"]
KEYS, NEAREST = ["image", "target", "valid"], ("bilinear", "nearest", "nearest")


class MaskAugment:
    """`default`: flips, quarter turns, small rotations, contrast and gamma; `flip`: flips and quarter turns alone.

    `salt`: half are mirrored, half turned by 1 to 10 degrees, half brightened up to twofold. `samed`: half are turned by quarters and
    mirrored, half of the others by up to 20 degrees.

    Image (3, H, W) in [0, 1], target and valid (1, H, W); sizes stay, and what a rotation brings in is not valid.
    """

    def __init__(self, name: AugmentName) -> None:
        from monai import transforms as mt  # takes seconds

        degrees = math.pi / 180
        flips = [mt.RandFlipd(KEYS, 0.5, 0), mt.RandFlipd(KEYS, 0.5, 1), mt.RandRotate90d(KEYS, 0.5)]

        def turned(low: float, high: float, prob: float) -> mt.Transform:
            return mt.RandRotated(KEYS, range_x=(low * degrees, high * degrees), prob=prob, mode=NEAREST, padding_mode="zeros")

        chains = {
            "none": [],
            "flip": flips,
            "default": [
                *flips,
                turned(-20, 20, 0.3),
                mt.RandScaleIntensityd("image", 0.2, prob=0.5),
                mt.RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.4)),
            ],
            "salt": [mt.RandFlipd(KEYS, 0.5, 1), turned(1, 10, 0.5), mt.RandScaleIntensityd("image", (0.0, 1.0), prob=0.5)],
            "samed": [mt.OneOf([mt.Compose([mt.RandRotate90d(KEYS, 0.75), mt.RandFlipd(KEYS, 1.0, 0)]), turned(-20, 20, 0.5)])],
        }
        self.name = name
        self.chain = mt.Compose(chains[name], map_items=False) if chains[name] else None

    def __call__(self, image: Tensor, target: Tensor, valid: Tensor, draw: int) -> tuple[Tensor, Tensor, Tensor]:
        """Changed as `draw` (32 bits) says."""
        if self.chain is None:
            return image, target, valid
        self.chain.set_random_state(seed=draw)
        out = self.chain({"image": image, "target": target.float(), "valid": valid.float()})
        plain = [value.as_tensor() if hasattr(value, "as_tensor") else value for value in (out["image"], out["target"], out["valid"])]
        return plain[0].clamp(0, 1).contiguous(), plain[1].round().to(target.dtype).contiguous(), (plain[2] > 0.5).contiguous()
