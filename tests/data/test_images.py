"""Odd files become right RGB pictures; broken ones are found before training, once."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vision_peft.data.verify as verify_module
from vision_peft.data.images import BadImage, load_rgb
from vision_peft.data.records import Record
from vision_peft.data.verify import verify
from vision_peft.errors import UserError


def _load(path: Path) -> np.ndarray:
    image = load_rgb(Record(path, 0))
    assert image.mode == "RGB"
    return np.asarray(image)


def test_transparency_becomes_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[0, 0] = (200, 10, 10, 255)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    loaded = _load(tmp_path / "rgba.png")
    assert loaded[0, 0].tolist() == [200, 10, 10] and loaded[3, 3].tolist() == [255, 255, 255]

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert _load(tmp_path / "palette.png").tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_sixteen_bit_grey_keeps_its_scale(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert _load(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_unknown_grey_scale_is_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(BadImage, match=r"float\.tiff: .*no fixed grey scale"):
        _load(tmp_path / "float.tiff")


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the picture rotated by 90 degrees clockwise
    image = Image.new("RGB", (32, 16))
    image.paste((255, 0, 0), (0, 0, 16, 16))  # red on the left, which belongs on top
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    loaded = _load(tmp_path / "turned.jpg")
    assert loaded.shape == (32, 16, 3)
    assert loaded[4, 8, 0] > 200 and loaded[28, 8, 0] < 50


def test_cmyk_and_bilevel(tmp_path):
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(tmp_path / "cmyk.jpg")
    Image.new("1", (4, 4), 1).save(tmp_path / "bilevel.png")
    for name in ("cmyk.jpg", "bilevel.png"):
        assert _load(tmp_path / name).min() >= 250


def test_picture_in_memory():
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(np.asarray(load_rgb(Record(Path("memory"), 0, pixels)))[..., 2], pixels)


@pytest.fixture
def broken(tmp_path, picture) -> list[Record]:
    """A good picture, a JPEG whose last rows are cut off (its header is whole), a text file, a missing file, the good one again."""
    good = picture(tmp_path / "good.png")
    cut = picture(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-300])
    with Image.open(cut) as image:
        assert image.size == (32, 24)
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    return [Record(path, 0) for path in (good, cut, text, tmp_path / "gone.png", good)]


def test_error_names_the_first_bad_picture_and_counts(broken):
    with pytest.raises(UserError, match=r"cut\.jpg: cannot be decoded .*truncated.*3 bad pictures among 4") as error:
        verify(broken)
    assert "\n" not in str(error.value)


def test_skip_leaves_bad_pictures_out_and_names_each(broken):
    with pytest.warns(UserWarning, match=r"(?s)left out 3 bad pictures:\n.*cut\.jpg.*\n.*text\.png.*\n.*gone\.png: does not exist"):
        kept = verify(broken, "skip")
    assert kept == [broken[0], broken[4]]


def test_good_pictures_are_decoded_once_until_they_change(tmp_path, picture, monkeypatch):
    records = [Record(picture(tmp_path / f"{number}.png", number), 0) for number in range(3)]
    decoded = []
    monkeypatch.setattr(verify_module, "load_rgb", lambda record: decoded.append(record.path.name) or load_rgb(record))
    verify(records)
    verify(records)
    assert sorted(decoded) == ["0.png", "1.png", "2.png"]
    time.sleep(0.01)
    records[1].path.write_bytes(records[1].path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"1\.png: .*: 1 bad picture among 3"):
        verify(records)
    assert decoded[3:] == ["1.png"]


def test_cache_that_cannot_be_written_warns(tmp_path, picture, monkeypatch):
    blocker = tmp_path / "file"
    blocker.touch()
    monkeypatch.setenv("VISION_PEFT_CACHE", str(blocker / "below"))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert verify([Record(picture(tmp_path / "a.png"), 0)])


def test_no_warning_when_all_is_well(tmp_path, picture):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = Record(picture(tmp_path / "a.png"), 0)
        assert verify([record]) == [record]
