"""Scikit-learn's handwritten digits: real pictures that need no download."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from vision_peft.data.records import ImageSplits, Record
from vision_peft.data.source import Source

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Digits(Source):
    """1797 grey pictures of 8 x 8 pixels, ten classes of 174 to 183, inside the installed package.

    The split is fixed and by class: shuffled by a fixed stream, the first quarter is test, the next 15 % val, the rest train.
    """

    def read(self) -> ImageSplits:
        from sklearn.datasets import load_digits  # imported here: only this reader needs scikit-learn

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), grey levels 0..16 -> 0..255
        splits = ImageSplits([], [], [], list(NAMES))
        for label in range(len(NAMES)):
            rows = [int(row) for row in np.flatnonzero(digits.target == label)]
            records = [Record(Path(f"digits/{row:04d}"), label, images[row]) for row in rows]
            random.Random(label).shuffle(records)
            test, val = round(0.25 * len(records)), round(0.40 * len(records))
            splits.test += records[:test]
            splits.val += records[test:val]
            splits.train += records[val:]
        return splits.check(Path("scikit-learn digits"))
