"""The numbers of a medical picture: 8- and 16-bit files, DICOM, and slices of NIfTI volumes, as float32."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vision_peft.data.images import BadImage, load_rgb
from vision_peft.data.records import Record
from vision_peft.errors import UserError

DICOM, NIFTI = (".dcm", ".dicom"), (".nii", ".nii.gz")


@dataclass(frozen=True)
class Pixels:
    """A picture as it was stored.

    Attributes:
        values: float32 (H, W, 3), grey repeated; pictures in [0, 1] whatever their depth, DICOM and NIfTI in their own units.
        measured: whether the values are the scanner's own units (Hounsfield for CT), which windows are given in.
        spacing: mm between rows and between columns; 1.0 where the file has none.
    """

    values: np.ndarray
    measured: bool = False
    spacing: tuple[float, float] = (1.0, 1.0)


def load_pixels(path: Path, index: int | None = None) -> Pixels:
    """The picture at `path`, or slice `index` of a volume along its third axis.

    Pictures are read as load_rgb says (alpha on white, EXIF's way up), but 16-bit grey keeps its depth.

    Raises:
        BadImage: one line, for what is missing, broken, or a volume without a slice.
    """
    name = path.name.lower()
    if name.endswith(DICOM):
        return _measured(path, "pydicom", "PydicomReader", None)
    if name.endswith(NIFTI):
        return _measured(path, "nibabel", "NibabelReader", index)
    deep = _deep(path)
    if deep is not None:
        return Pixels(np.repeat(deep[..., None].astype(np.float32) / 65535, 3, 2))
    return Pixels(np.asarray(load_rgb(Record(path, -1)), np.float32) / 255)


def list_slices(path: Path) -> list[int | None]:
    """The slices of a volume, or [None] for what is one picture."""
    if not path.name.lower().endswith(NIFTI):
        return [None]
    load_pixels(path, 0)  # says what is wrong with it
    values, _ = _read_volume(str(path), "NibabelReader")
    return list(range(values.shape[2])) if values.ndim == 3 else [None]


def load_labels(path: Path, index: int | None = None) -> np.ndarray:
    """A label image as integers (H, W): what each pixel's number says, palettes as their indices.

    Raises:
        BadImage: one line, for a colour picture (whose labels cannot be known) and as load_pixels.
    """
    if path.name.lower().endswith((*DICOM, *NIFTI)):
        values = load_pixels(path, index).values[..., 0]
        if not np.array_equal(values, np.round(values)):
            raise BadImage(f"{path}: its values are no whole numbers, so it is no label image")
        return values.astype(np.int64)
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in ("1", "L", "P", "I", "LA") and not image.mode.startswith("I;16"):
                bands = np.asarray(image.convert("RGB"))
                if not (bands[..., :1] == bands).all():
                    raise BadImage(f"{path}: is a colour picture; a label image holds one number a pixel")
                return bands[..., 0].astype(np.int64)
            return np.asarray(image.getchannel(0) if image.mode == "LA" else image).astype(np.int64)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever goes wrong inside them
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be decoded ({error})"
        raise BadImage(f"{path}: {reason}".replace("\n", " ")) from error


def _deep(path: Path) -> np.ndarray | None:
    """A 16-bit grey picture's numbers; None for any other, and for what load_rgb will explain."""
    try:
        with Image.open(path) as image:
            return np.asarray(image) if image.mode.startswith("I;16") else None
    except Exception:  # load_rgb opens it next and says what is wrong
        return None


def _measured(path: Path, package: str, reader: str, index: int | None) -> Pixels:
    if find_spec(package) is None:
        raise UserError(f"{path}: reading it needs {package}: pip install 'vision-peft[medical]'")
    if not path.is_file():
        raise BadImage(f"{path}: does not exist")
    try:
        values, meta = _read_volume(str(path), reader)
    except Exception as error:  # readers raise whatever goes wrong inside them
        raise BadImage(f"{path}: cannot be decoded ({error})".replace("\n", " ")) from error
    if values.ndim == 3 and values.shape[2] == 1 and index is None:
        index = 0
    if values.ndim == 3:
        if index is None:
            raise BadImage(f"{path}: is a volume of {values.shape[2]} slices; name one in the split file's column `slice`")
        if not 0 <= index < values.shape[2]:
            raise BadImage(f"{path}: has no slice {index}; it has {values.shape[2]}, counted from 0")
        values = values[:, :, index]
    if values.ndim != 2:
        raise BadImage(f"{path}: has {values.ndim} axes; pictures and volumes have 2 or 3")
    rows = values.T  # MONAI's readers put x first
    spacing = np.asarray(meta.get("spacing", (1.0, 1.0)), float)
    return Pixels(np.repeat(rows[..., None].astype(np.float32), 3, 2), True, (float(spacing[1]), float(spacing[0])))


@lru_cache(maxsize=2)
def _read_volume(path: str, reader: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Values (x, y[, z]) and spacing; the last volumes are kept, because their slices are asked for one by one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import monai.data

        source = getattr(monai.data, reader)()
        values, meta = source.get_data(source.read(path))
    affine = np.asarray(meta.get("affine", np.eye(4)), float)
    size = np.sqrt((affine[:2, :2] ** 2).sum(0))
    return np.asarray(values), {"spacing": tuple(size)}
