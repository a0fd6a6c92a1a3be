"""A quality set without observers: clean pictures under every distortion, whose score is the level, 6 - level, and 6 for the clean one.

Levels of two distortions are not comparable in the eye, so that such a score stands in for opinions only where there are none.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vision_peft.data.distortions.bank import BANK, LEVELS, distort
from vision_peft.data.images import load_rgb
from vision_peft.data.records import Record
from vision_peft.engine.store import staged_folder
from vision_peft.errors import UserError, nearest


def write_distorted(pictures: Sequence[Path], folder: Path, kinds: Sequence[str] | None = None, levels: int = LEVELS, seed: int = 1) -> int:
    """Write images/*.png and split.csv (path, mos, reference, distortion, level), whole or not at all.

    Args:
        kinds: of the bank; None: all whose level is a strength.
        levels: drawn of the five, for a picture and a distortion.

    Returns:
        the number of pictures.
    """
    kinds = [name for name, entry in BANK.items() if entry.severity] if kinds is None else kinds
    if unknown := [name for name in kinds if name not in BANK]:
        raise UserError(f"--kinds: no distortion {unknown[0]!r}{nearest(unknown[0], BANK)}")
    if not 1 <= levels <= LEVELS:
        raise UserError(f"--levels: must be from 1 to {LEVELS}, not {levels}")
    rows = []
    with staged_folder(folder, frozenset({"images", "split.csv"}), "a folder of distorted pictures") as staging:
        (staging / "images").mkdir()
        for index, path in enumerate(tqdm(pictures, desc="distorting", unit="img")):
            reference = f"{index:04d}_{path.stem}"
            clean = load_rgb(Record(path, -1))
            rows.append([_save(clean, staging, f"{reference}.png"), LEVELS + 1, reference, "", 0])
            image = torch.from_numpy(np.array(clean)).permute(2, 0, 1).float() / 255
            for name in kinds:
                for level in sorted(random.Random(f"{seed}/{reference}/{name}").sample(range(1, LEVELS + 1), levels)):
                    draw = torch.Generator().manual_seed(random.Random(f"{seed}/{reference}/{name}/{level}").getrandbits(63))
                    spoilt = as_picture(distort(image, name, level, draw))
                    rows.append([_save(spoilt, staging, f"{reference}_{name}_{level}.png"), LEVELS + 1 - level, reference, name, level])
        with (staging / "split.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["path", "mos", "reference", "distortion", "level"], *rows])
    return len(rows)


def as_picture(image: torch.Tensor) -> Image.Image:
    """8 bits of (3, H, W) in [0, 1]."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def _save(picture: Image.Image, folder: Path, name: str) -> str:
    picture.save(folder / "images" / name, compress_level=1)
    return f"images/{name}"
