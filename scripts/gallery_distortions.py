"""docs/distortions.jpg: one photograph (of scikit-learn) under every distortion of the bank at every level.

    python scripts/gallery_distortions.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_image

from vision_peft.data.distortions import BANK, LEVELS, distort

PAGE = Path("docs/distortions.jpg")


def main() -> None:
    whole = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1).float() / 255
    picture = whole[:, 100:300, 120:420].contiguous()  # 200 x 300
    names = list(BANK)
    half = -(-len(names) // 2)
    figure, axes = plt.subplots(half, 2 * LEVELS, figsize=(16, 1.18 * half), gridspec_kw={"wspace": 0.03, "hspace": 0.28})
    for place, name in enumerate(names):
        row, side = place % half, place // half
        for level in range(1, LEVELS + 1):
            axis = axes[row, side * LEVELS + level - 1]
            spoilt = distort(picture, name, level, torch.Generator().manual_seed(0))
            axis.imshow(spoilt.permute(1, 2, 0).clamp(0, 1).numpy())
            title = f"{BANK[name].levels[level - 1]:g}"
            axis.set_title(title if level > 1 else f"{name.replace('_', ' ')} {title}", fontsize=7, loc="left", pad=2)
            axis.axis("off")
    figure.savefig(PAGE, dpi=85, bbox_inches="tight", pil_kwargs={"quality": 80})


if __name__ == "__main__":
    main()
