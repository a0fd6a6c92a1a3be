"""Predicted masks as files: each in its picture's own size, and in its format where that keeps labels."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from vision_peft.data.pixels import NIFTI

LOSSLESS = (".png", ".tif", ".tiff", ".bmp")


def write_mask(folder: Path, source: Path, name: str, labels: np.ndarray) -> Path:
    """Write labels (H, W), uint8, beside no other: NAME.png, .tif or .bmp as the picture, .png where its format would spoil labels.

    Written whole or not at all.
    """
    suffix = source.suffix.lower() if source.suffix.lower() in LOSSLESS else ".png"
    return _published(folder / f"{name}{suffix}", lambda path: Image.fromarray(labels).save(path))


def write_volume(folder: Path, source: Path, slices: list[np.ndarray]) -> Path:
    """Write the slices' labels (H, W) as a NIfTI volume with the source's affine."""
    import nibabel

    volume = np.stack([each.T for each in slices], axis=2)  # x, y, z
    suffix = next(each for each in reversed(NIFTI) if source.name.lower().endswith(each))
    affine = nibabel.load(source).affine
    image = nibabel.Nifti1Image(volume, affine)
    return _published(folder / f"{source.name[: -len(suffix)]}{suffix}", lambda path: nibabel.save(image, path))


def _published(path: Path, write: Callable[[Path], None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mask-", dir=path.parent) as scratch:
        fresh = Path(scratch) / path.name
        write(fresh)
        os.replace(fresh, path)
    return path
