"""From a file to an RGB picture, whatever the file holds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vision_peft.data.records import Record
from vision_peft.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"})


class BadImage(UserError):
    """A picture that cannot be decoded; the message names it and says why."""


def list_images(folder: Path) -> list[Path]:
    """Every picture below `folder` (by suffix; hidden files and folders are passed over), sorted by path."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")]
    return sorted(found)


def load_rgb(record: Record) -> Image.Image:
    """The whole picture, decoded, 8-bit RGB, the way up its EXIF tag says.

    Transparent parts become white (dropping the alpha channel would show whatever colours lie under it). Deep grey pictures keep
    their scale: 0..65535 becomes 0..255, without stretching. CMYK, YCbCr, palettes and bilevel pictures are converted; of an
    animation the first frame is taken.

    Raises:
        BadImage: missing, truncated, not a picture, or of a kind whose grey scale cannot be known (32-bit integers, floats).
    """
    if record.pixels is not None:
        return Image.fromarray(record.pixels).convert("RGB")
    try:
        with Image.open(record.path) as image:
            image.load()  # decodes every row: opening reads the header only, and a truncated file has a good one
            return _to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    # Decoders meet arbitrary bytes and raise whatever goes wrong inside them: OSError, SyntaxError, struct.error, ValueError ...
    except Exception as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be decoded ({error})"
        raise BadImage(f"{record.path}: {reason}".replace("\n", " ")) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.float32)  # (H, W), 0..65535; the array is in native byte order
        return Image.fromarray(np.round(deep / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no fixed grey scale; save it as 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
