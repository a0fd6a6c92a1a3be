"""Small sets on disk, and a cache folder that is not the user's."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_peft.backbones.base import Preprocess
from vision_peft.data import Digits
from vision_peft.data.fewshot_images import FewShotImages


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VISION_PEFT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def preprocess() -> Preprocess:
    return Preprocess(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture
def picture():
    """`picture(path, number)` writes a noise picture that depends on `number`, 24 high and 32 wide, and gives the path."""

    def write(path: Path, number: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)
        return path

    return write


@pytest.fixture
def csv_set(tmp_path, picture) -> Path:
    """split.csv of two classes with 3 train, 2 val, 1 test pictures each."""
    rows = ["path,label,split"]
    number = 0
    for label in ("red_fox", "cat"):
        for split, count in (("train", 3), ("val", 2), ("test", 1)):
            for _ in range(count):
                number += 1
                name = f"images/{label}/{number}.png"
                picture(tmp_path / name, number)
                rows.append(f"{name},{label},{split}")
    file = tmp_path / "split.csv"
    file.write_text("\n".join(rows) + "\n")
    return file


@pytest.fixture
def digits(preprocess):
    """`digits(**arguments)` is a module over the digits, 2 shots, batches of 6 (20 pictures: 4 batches, the last of 2)."""

    def build(**arguments) -> FewShotImages:
        data = FewShotImages(Digits(), **{"shots": 2, "batch_size": 6, **arguments})
        data.preprocess = preprocess
        return data

    return build


@pytest.fixture
def real_set():
    """`real_set("dtd10")` is the folder of a real set; skips where it is absent."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("VISION_PEFT_DATA", "datasets")) / name
        if not folder.is_dir():
            pytest.skip(f"needs the set {name} in VISION_PEFT_DATA ({folder.parent})")
        return folder.resolve()

    return find
