"""Features of many pictures, by size, in parts that are kept: an extraction that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from tqdm import tqdm

from vision_peft.data.images import load_rgb
from vision_peft.data.records import Record
from vision_peft.errors import UserError
from vision_peft.quality.experts import Expert, features
from vision_peft.user_cache import keep_tensors

PART = 32  # pictures a file
AT_ONCE = 2**22  # pixels, unless a single picture has more
FEATURES, CONFIG = "features.safetensors", "features.json"


@dataclass(frozen=True)
class Extracted:
    """Features (N, D) of pictures, in their order, and the experts that gave them."""

    paths: list[str]
    values: np.ndarray
    experts: list[dict[str, Any]]


def extract(paths: Sequence[Path], experts: Sequence[Expert], folder: Path, batch: int = 8) -> Extracted:
    """Features of every picture, written to `folder`; parts that are there already are taken as they are.

    Args:
        batch: pictures of one size that pass at once, at most; fewer of large ones.

    Raises:
        UserError: names a picture that cannot be decoded or is too small; what was finished before it stays.
    """
    described = [expert.describe() for expert in experts]
    groups: dict[tuple[int, int], list[int]] = {}
    for index, path in enumerate(paths):
        groups.setdefault(_size(path), []).append(index)
    parts = [group[start : start + PART] for group in groups.values() for start in range(0, len(group), PART)]
    values = np.zeros((len(paths), 2 * sum(expert.width for expert in experts)), np.float32)
    with tqdm(total=len(paths), desc="features", unit="img", disable=len(paths) < 4) as bar:
        for part in parts:
            values[part] = _part([paths[index] for index in part], experts, described, folder / "parts", batch)
            bar.update(len(part))
    keep_tensors(folder / FEATURES, {"features": torch.from_numpy(values)})
    names = [str(path) for path in paths]
    (folder / CONFIG).write_text(json.dumps({"paths": names, "experts": described}, indent=1) + "\n")
    return Extracted(names, values, described)


def load_extracted(folder: Path) -> Extracted:
    """What extract() wrote."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        return Extracted(config["paths"], load_file(folder / FEATURES)["features"], config["experts"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: not a folder of features ({type(error).__name__}: {error})") from error


def _part(paths: list[Path], experts: Sequence[Expert], described: list[dict[str, Any]], folder: Path, batch: int) -> np.ndarray:
    facts = [described, [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]]
    kept = folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.safetensors"
    if kept.is_file():
        return load_file(kept)["features"]
    rows = []
    width, height = _size(paths[0])
    batch = max(1, min(batch, AT_ONCE // max(1, width * height)))
    for start in range(0, len(paths), batch):
        chosen = paths[start : start + batch]
        try:
            rows.append(features(experts, [load_rgb(Record(path, -1)) for path in chosen]))
        except UserError as error:
            raise UserError(f"{chosen[0]}: {error}" if str(error).startswith("is ") else str(error)) from error
    found = np.concatenate(rows)
    keep_tensors(kept, {"features": torch.from_numpy(found)})
    return found


def _size(path: Path) -> tuple[int, int]:
    """Width and height as they will be decoded; a file that is no picture is told when it is decoded."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(274, 1) in (5, 6, 7, 8)  # EXIF's orientations with sides exchanged
            return image.size[::-1] if turned else image.size
    except Exception:  # load_rgb says what is wrong, in one line
        return (0, 0)
