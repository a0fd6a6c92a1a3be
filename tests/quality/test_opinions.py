"""Opinion scores: what a file may hold, and divisions that keep references together."""

from __future__ import annotations

import pytest
from PIL import Image

from vision_peft.errors import UserError
from vision_peft.quality.opinions import Opinion, divide, read_opinions


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path))
    for i in range(4):
        Image.new("RGB", (70, 70)).save(tmp_path / f"{i}.png")
    (tmp_path / "scores.csv").write_text("path,mos,std,reference,extra\n" + "".join(f"{i}.png,{i / 2},0.1,r{i // 2},x\n" for i in range(4)))
    return tmp_path


def test_rows_are_read(folder):
    found = read_opinions("scores.csv")
    assert [(each.path.name, each.score, each.std, each.reference) for each in found][3] == ("3.png", 1.5, 0.1, "r1")
    assert [each.score for each in read_opinions("scores.csv", lower_is_better=True)] == [0, -0.5, -1.0, -1.5]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("1.png,0.5", "1.png,", "line 3: mos is missing"),
        ("1.png,0.5", "1.png,good", "line 3: mos is 'good', not a number"),
        ("1.png,0.5", "1.png,nan", "line 3: mos is nan, not a finite number"),
        ("1.png,0.5", "9.png,0.5", "line 3: path 9.png does not exist"),
        ("1.png,0.5", "0.png,0.5", "line 3: 0.png is listed twice"),
        ("path,mos", "path,moss", "no column 'mos'.*moss"),
        ("1.png,0.5,0.1", "1.png,0.5,wide", "line 3: std is 'wide'"),
    ],
)
def test_what_is_wrong_is_one_line(folder, old, new, message):
    text = (folder / "scores.csv").read_text()
    (folder / "scores.csv").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        read_opinions("scores.csv")
    assert "\n" not in str(caught.value)


def test_references_are_divided_whole():
    opinions = [Opinion(None, 0.0, reference=f"r{i // 5}") for i in range(100)]
    for seed in range(5):
        parts = divide(opinions, (0.7, 0.1, 0.2), seed)
        assert sorted(index for part in parts for index in part) == list(range(100))
        references = [{opinions[index].reference for index in part} for part in parts]
        assert not references[0] & references[2] and not references[1] & references[2] and not references[0] & references[1]
        assert [len(part) for part in parts] == [70, 10, 20]
    assert divide(opinions, (0.7, 0.1, 0.2), 1) == divide(opinions, (0.7, 0.1, 0.2), 1) != divide(opinions, (0.7, 0.1, 0.2), 2)
