"""The seven vessel sets, from small archives in their published layouts."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision_peft.backbones.base import Preprocess
from vision_peft.cli import main
from vision_peft.data.segmentation_images import SegmentationImages

RNG = np.random.default_rng(0)


def encoded(kind: str, mask: bool = False) -> bytes:
    values = (RNG.random((12, 16)) < 0.3).astype(np.uint8) * 255 if mask else RNG.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    picture = Image.fromarray(values)
    form = {"tif": "TIFF", "jpg": "JPEG", "pgm": "PPM", "ppm": "PPM"}.get(kind, kind)
    (picture.convert("L") if kind == "pgm" else picture).save(stream, form)
    return stream.getvalue()


def drive() -> dict[str, bytes]:
    files = {}
    for split, numbers in (("training", range(21, 41)), ("test", range(1, 21))):
        for i in numbers:
            files[f"DRIVE/{split}/images/{i:02d}_{split}.tif"] = encoded("tif")
            files[f"DRIVE/{split}/1st_manual/{i:02d}_manual1.gif"] = encoded("gif", mask=True)
            files[f"DRIVE/{split}/mask/{i:02d}_{split}_mask.gif"] = encoded("gif", mask=True)
    return files


def stare() -> dict[str, bytes]:
    pictures = {f"im{i:04d}.ppm.gz": gzip.compress(encoded("ppm")) for i in range(20)}
    return pictures | {f"im{i:04d}.ah.ppm.gz": gzip.compress(encoded("ppm", mask=True)) for i in range(20)}


def chase_db1() -> dict[str, bytes]:
    files = {}
    for i in range(1, 15):
        for eye in "LR":
            files[f"Image_{i:02d}{eye}.jpg"] = encoded("jpg")
            files[f"Image_{i:02d}{eye}_1stHO.png"] = files[f"Image_{i:02d}{eye}_2ndHO.png"] = encoded("png", mask=True)
    return files


def rose() -> dict[str, bytes]:
    files = {}
    for kind in ("SVC", "DVC", "SVC_DVC"):
        for split, count in (("train", 30), ("test", 9)):
            for i in range(1, count + 1):
                files[f"data/ROSE-1/{kind}/{split}/img/{i:02d}.tif"] = encoded("tif")
                files[f"data/ROSE-1/{kind}/{split}/gt/{i:02d}.tif"] = encoded("tif", mask=True)
    return files


def arcade() -> dict[str, bytes]:
    files = {}
    for split, count in (("train", 1000), ("val", 200), ("test", 300)):
        pictures = [{"id": i, "file_name": f"{i}.png", "width": 16, "height": 12} for i in range(1, count + 1)]
        polygon = [2, 2, 9, 2, 9, 8, 2, 8]
        marks = [{"image_id": i, "category_id": 1 + i % 5, "segmentation": [polygon]} for i in range(1, count + 1)]
        files[f"arcade/syntax/{split}/annotations/{split}.json"] = json.dumps({"images": pictures, "annotations": marks}).encode()
        same = encoded("png")
        files |= {f"arcade/syntax/{split}/images/{i}.png": same for i in range(1, count + 1)}
        files[f"arcade/stenosis/{split}/images/1.png"] = same
    return files


def dias() -> dict[str, bytes]:
    files = {}
    for folder, start, count in (("training", 0, 30), ("validation", 30, 10), ("test", 40, 20)):
        for i in range(start, start + count):
            files |= {f"DIAS/{folder}/images/image_s{i}_i{frame}.png": encoded("png") for frame in range(3)}
            files[f"DIAS/{folder}/labels/label_s{i}.png"] = encoded("png", mask=True)
    return files


def xray_angio() -> dict[str, bytes]:
    pictures = {f"Database/{i}.pgm": encoded("pgm") for i in range(1, 135)}
    return pictures | {f"Database/{i}_gt.pgm": encoded("pgm", mask=True) for i in range(1, 135)}


MAKERS = {make.__name__: make for make in (drive, stare, chase_db1, rose, arcade, dias, xray_angio)}
COUNTS = {"drive": (20, 20), "stare": (16, 4), "chase_db1": (20, 8), "rose": (90, 27), "arcade": (1000, 300), "dias": (30, 20)}
COUNTS["xray_angio"] = (100, 34)


def packed(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", MAKERS)
def test_a_vessel_set_is_prepared_and_read(name, tmp_path, monkeypatch, capsys):
    train, test = COUNTS[name]
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path / "sets"))
    archive = packed(tmp_path / f"{name}.zip", MAKERS[name]())
    assert main(["data", "prepare", name, "--archive", str(archive)]) == 0, capsys.readouterr().err
    assert "the counts are those recalled from the set's own description" in capsys.readouterr().out
    data = SegmentationImages(f"{name}/split.csv", augment="none", intensity="minmax", batch_size=2)
    data.preprocess = Preprocess(32, (0.0,) * 3, (1.0,) * 3)
    kept = {split: records[:3] for split, records in data.splits.items()}
    held_out = 0 if name in ("arcade", "dias") else len(data.splits["val"])  # the others have no val of their own
    assert len(data.splits["test"]) == test and len(data.splits["train"]) + held_out == train
    data.splits = kept
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 32, 32) and batch["target"].any()
    assert (tmp_path / "sets" / name).is_dir() and not list((tmp_path / "sets" / name).rglob("*.gz"))
    if name == "drive":
        assert not batch["valid"].all(), "the field of view is not read"


def test_a_missing_mask_is_named_and_nothing_is_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path / "sets"))
    files = chase_db1()
    del files["Image_05R_1stHO.png"]
    assert main(["data", "prepare", "chase_db1", "--archive", str(packed(tmp_path / "a.zip", files))]) == 2
    assert "Image_05R.jpg: there is no Image_05R_1stHO.png for its masks" in capsys.readouterr().err
    assert not (tmp_path / "sets").exists() or not list((tmp_path / "sets").iterdir())


def test_another_archive_is_told_from_the_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path / "sets"))
    assert main(["data", "prepare", "drive", "--archive", str(packed(tmp_path / "a.zip", {"readme.txt": b"x"}))]) == 2
    assert "no file in the archives ends in training/images/N_training.tif: the set comes as DRIVE.zip" in capsys.readouterr().err
