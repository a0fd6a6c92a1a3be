"""Whether a score falls as a picture is spoilt more: every distortion of the bank at every level, on pictures that are clean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from tqdm import tqdm

from vision_peft.data.distortions.bank import BANK, LEVELS, distort
from vision_peft.quality.distorted_set import as_picture


@dataclass(frozen=True)
class Sensitivity:
    """Of one distortion.

    Attributes:
        scores: (pictures, 1 + levels): of the picture itself, then of levels 1 to 5.
    """

    name: str
    scores: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """(1 + levels,) over the pictures."""
        return self.scores.mean(0)

    @property
    def falls(self) -> bool:
        """Whether the mean score falls from each level to the next."""
        return bool((np.diff(self.means[1:]) < 0).all())

    @property
    def spearman(self) -> float:
        """Rank correlation of score and level 1 to 5, mean over pictures; -1 is the best. A picture whose scores are all equal counts 0."""
        levels = np.arange(LEVELS)
        each = [spearmanr(levels, row).statistic if np.ptp(row) > 0 else 0.0 for row in self.scores[:, 1:]]
        return float(np.mean(each))


def sensitivity(
    score: Callable[[Sequence[Image.Image]], np.ndarray], pictures: Sequence[Image.Image], names: Sequence[str] = tuple(BANK)
) -> list[Sensitivity]:
    """One entry a distortion.

    Args:
        score: (B,) of B pictures of one size.
        pictures: RGB, undistorted.
    """
    clean = [float(score([picture])[0]) for picture in pictures]
    found = []
    for name in tqdm(names, desc="distortions"):
        rows = []
        for index, picture in enumerate(pictures):
            image = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
            draw = torch.Generator().manual_seed(index)
            spoilt = [as_picture(distort(image, name, level, draw)) for level in range(1, LEVELS + 1)]
            rows.append([clean[index], *score(spoilt)])
        found.append(Sensitivity(name, np.array(rows)))
    return found
