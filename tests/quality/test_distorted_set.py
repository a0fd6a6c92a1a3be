"""A set with known levels: what is in it, that it is the same twice, and what is refused."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from vision_peft.cli import main
from vision_peft.data.distortions.bank import distort
from vision_peft.quality.opinions import divide, read_opinions


@pytest.fixture
def clean(tmp_path):
    rows = ["path,split"]
    for seed in range(3):
        coarse = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((72, 72), Image.Resampling.BICUBIC).save(tmp_path / f"{seed}.png")
        rows.append(f"{seed}.png,{'val' if seed == 2 else 'train'}")
    (tmp_path / "pristine.csv").write_text("\n".join([*rows, ""]))
    return tmp_path


def make(folder, *more: str) -> int:
    return main(["quality", "distort", str(folder / "pristine.csv"), "--folder", str(folder / "out"), *more])


def test_what_is_written(clean):
    assert make(clean, "--kinds", "jpeg", "lens_blur", "--levels", "2") == 0
    rows = list(csv.DictReader((clean / "out" / "split.csv").open()))
    assert len(rows) == 2 * (1 + 2 * 2), "of the two pictures that are called train"
    assert all(int(row["mos"]) == 6 - int(row["level"]) for row in rows)
    [first] = [row for row in rows if row["path"].endswith("0000_0.png")]
    assert np.array_equal(np.asarray(Image.open(clean / "out" / first["path"])), np.asarray(Image.open(clean / "0.png")))
    blurred = next(row for row in rows if row["distortion"] == "lens_blur")
    source = torch.from_numpy(np.array(Image.open(clean / "0.png"))).permute(2, 0, 1) / 255
    expected = distort(source, "lens_blur", int(blurred["level"]), torch.Generator()).permute(1, 2, 0) * 255
    np.testing.assert_allclose(np.asarray(Image.open(clean / "out" / blurred["path"])), expected, atol=0.51)
    opinions = read_opinions(str(clean / "out" / "split.csv"))
    parts = divide(opinions, (0.5, 0.25, 0.25), 0)
    found = [{opinions[index].reference for index in part} for part in parts]
    assert not found[0] & found[1] and not found[0] & found[2]


def test_all_whose_level_is_a_strength_and_the_same_twice(clean):
    assert make(clean, "--levels", "1") == 0
    first = {path.name: path.read_bytes() for path in (clean / "out" / "images").iterdir()}
    assert len(first) == 2 * (1 + 24)
    assert make(clean, "--levels", "1") == 0
    assert {path.name: path.read_bytes() for path in (clean / "out" / "images").iterdir()} == first
    assert make(clean, "--levels", "1", "--seed", "2") == 0
    assert {path.name: path.read_bytes() for path in (clean / "out" / "images").iterdir()} != first


@pytest.mark.parametrize(
    "more, message",
    [
        (["--kinds", "jpg"], "no distortion 'jpg'"),
        (["--levels", "6"], "--levels: must be from 1 to 5"),
        (["--split", "test"], "no picture in it"),
    ],
)
def test_what_is_refused(clean, more, message, capsys):
    assert make(clean, *more) == 2
    assert message in capsys.readouterr().err
    assert not (clean / "out").exists()


def test_a_folder_of_other_things_is_left_alone(clean, capsys):
    (clean / "out").mkdir()
    (clean / "out" / "diary.txt").write_text("mine")
    assert make(clean) == 2
    assert "is not a folder of distorted pictures" in capsys.readouterr().err
    assert (clean / "out" / "diary.txt").read_text() == "mine"
