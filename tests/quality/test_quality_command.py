"""extract, fit and score by command."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vision_peft.cli import main
from vision_peft.data.distortions import distort
from vision_peft.quality import experts


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """24 pictures of two sizes, blurred more and more, whose opinion is how little."""
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path))
    rows = ["path,mos,reference"]
    for scene in range(6):
        size = (70, 96) if scene % 2 else (96, 80)
        clean = torch.rand(3, *size, generator=torch.Generator().manual_seed(scene)) * 0.8
        for level in (2, 3, 4, 5):
            spoilt = distort(clean, "gaussian_blur", level, torch.Generator().manual_seed(0))
            Image.fromarray((spoilt * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{scene}_{level}.png")
            rows.append(f"{scene}_{level}.png,{6 - level},{scene}")
    (tmp_path / "scores.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def extract(folder, *more: str) -> int:
    words = ["--scores", "scores.csv", "--experts", "random:resnet18", "random:test_vit", "--folder", str(folder / "f")]
    return main(["quality", "extract", *words, *more])


def test_the_whole_way_from_pictures_to_scores(folder, capsys):
    assert extract(folder) == 0
    assert "24 pictures" in capsys.readouterr().out
    config = json.loads((folder / "f" / "features.json").read_text())
    assert [each["name"] for each in config["experts"]] == ["random:resnet18", "random:test_vit"]
    fit = ["quality", "fit", "--scores", "scores.csv", "--features", str(folder / "f"), "--divisions", "3"]
    assert main([*fit, "--regressor", str(folder / "r")]) == 0
    said = capsys.readouterr().out
    assert "srcc" in said and "regressor:" in said
    out = ["--csv", str(folder / "scores_out.csv"), "--html", str(folder / "sheet.html")]
    assert main(["quality", "score", str(folder / "0_2.png"), str(folder / "0_5.png"), "--regressor", str(folder / "r"), *out]) == 0
    scored = {row["path"].rpartition("/")[2]: float(row["score"]) for row in csv.DictReader((folder / "scores_out.csv").open())}
    assert scored["0_2.png"] > scored["0_5.png"]
    page = (folder / "sheet.html").read_text()
    assert page.index("0_2.png") < page.index("0_5.png") and "data:image/jpeg;base64," in page


def test_extraction_is_the_same_twice_and_goes_on_where_it_stopped(folder, monkeypatch):
    assert extract(folder) == 0
    first = (folder / "f" / "features.safetensors").read_bytes()
    parts = sorted((folder / "f" / "parts").iterdir())
    assert len(parts) == 2  # one a size
    parts[0].unlink()
    (folder / "f" / "features.safetensors").unlink()
    calls = []
    own = experts.Encoder.__call__
    monkeypatch.setattr(experts.Encoder, "__call__", lambda self, images: calls.append(len(images)) or own(self, images))
    assert extract(folder) == 0
    assert sum(calls) == 12 * 4, "two experts at two sizes, for the pictures of one part"
    assert (folder / "f" / "features.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: Image.new("RGB", (50, 200)).save(path), "0_2.png: is 50 x 200 pixels; quality needs at least 64"),
        (lambda path: path.write_bytes(b"no picture"), "0_2.png: cannot be decoded"),
    ],
)
def test_a_bad_picture_is_named(folder, make, message, capsys):
    make(folder / "0_2.png")
    assert extract(folder) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["L", "RGBA", "I;16", "1"])
def test_grey_alpha_deep_and_bilevel_pictures_pass(folder, kind):
    values = np.random.default_rng(0).integers(0, 255, (80, 90), dtype=np.uint8)
    picture = Image.fromarray(values.astype(np.uint16) * 257) if kind == "I;16" else Image.fromarray(values).convert(kind)
    picture.save(folder / "0_2.png")
    assert extract(folder) == 0


def test_other_weights_are_refused(folder, capsys):
    extract(folder)
    fit = ["quality", "fit", "--scores", "scores.csv", "--features", str(folder / "f"), "--divisions", "2"]
    main([*fit, "--regressor", str(folder / "r")])
    facts = json.loads((folder / "r" / "regressor.json").read_text())
    facts["experts"][0]["fingerprint"] = "0" * 64
    (folder / "r" / "regressor.json").write_text(json.dumps(facts))
    assert main(["quality", "score", str(folder / "0_2.png"), "--regressor", str(folder / "r")]) == 2
    assert "was fitted to other weights of random:resnet18" in capsys.readouterr().err
