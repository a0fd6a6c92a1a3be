"""Every reader on a small set in its layout, and the one line it answers with when the set is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vision_peft.data import ClassSubset, CoopSplit, CsvSource, Digits, FgvcAircraft, ImageFolder, ImageNet
from vision_peft.errors import UserError


def test_csv_keeps_rows_sorts_labels_and_takes_prompt_words(csv_set):
    splits = CsvSource(str(csv_set)).read()
    assert [record.path.name for record in splits.train] == ["1.png", "2.png", "3.png", "7.png", "8.png", "9.png"]
    assert [record.label for record in splits.train] == [1, 1, 1, 0, 0, 0]
    assert splits.class_names == ["cat", "red_fox"]
    (csv_set.parent / "classnames.json").write_text('{"cat": "house cat", "red_fox": "red fox"}')
    assert CsvSource(str(csv_set)).read().class_names == ["house cat", "red fox"]


def test_csv_orders_numbers_by_value(tmp_path, picture):
    rows = [f"{picture(tmp_path / f'{label}.png').name},{label},train" for label in ("10", "9", "2")]
    (tmp_path / "split.csv").write_text("\n".join(["path,label,split", *rows]))
    assert CsvSource(str(tmp_path / "split.csv")).read().class_names == ["2", "9", "10"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("path,label,split", "path,labels,split", r"split\.csv: no column 'label' .*did you mean labels"),
        ("1.png,red_fox,train", "1.png,red_fox,Train", r"split\.csv, line 2: unknown split 'Train'.*did you mean train"),
        ("1.png,red_fox,train", "1.png,,train", r"split\.csv, line 2: label is missing"),
        ("1.png,red_fox,train", "1.png", r"split\.csv, line 2: label is missing"),
        ("images/red_fox/2.png", "images/red_fox/nope.png", r"split\.csv names .*nope\.png, which does not exist \(1 of 12"),
        ("images/red_fox/6.png", "images/red_fox/1.png", r"line 7: images/red_fox/1\.png is in test and in train"),
        ("6.png,red_fox,test", "6.png,wolf,test", r"split\.csv: class 'wolf' has no training picture"),
    ],
)
def test_csv_errors_name_file_and_line(csv_set, old, new, message):
    csv_set.write_text(csv_set.read_text().replace(old, new))
    with pytest.raises(UserError, match=message) as error:
        CsvSource(str(csv_set)).read()
    assert "\n" not in str(error.value)


def test_csv_with_byte_order_mark(csv_set):
    csv_set.write_bytes(b"\xef\xbb\xbf" + csv_set.read_bytes())
    assert len(CsvSource(str(csv_set)).read().train) == 6


def test_missing_words_are_an_error(csv_set):
    (csv_set.parent / "classnames.json").write_text('{"cat": "house cat"}')
    with pytest.raises(UserError, match=r"classnames\.json: no words for label 'red_fox'"):
        CsvSource(str(csv_set)).read()


def test_relative_paths_start_at_the_data_root_and_are_checked_by_the_constructor(csv_set, monkeypatch):
    monkeypatch.setenv("VISION_PEFT_DATA", str(csv_set.parent))
    assert CsvSource("split.csv").file == csv_set
    with pytest.raises(UserError, match=r"data\.source\.file: .*splits\.csv does not exist .*VISION_PEFT_DATA.*did you mean split\.csv"):
        CsvSource("splits.csv")


def test_folder_with_split_folders(tmp_path, picture):
    for split, label in (("train", "b"), ("train", "a"), ("test", "b")):
        picture(tmp_path / split / label / "x.png")
    picture(tmp_path / "train" / "a" / "deep" / "y.JPG")
    (tmp_path / "train" / "a" / "notes.txt").write_text("not a picture")
    (tmp_path / "train" / ".hidden").mkdir()
    splits = ImageFolder(str(tmp_path)).read()
    assert splits.class_names == ["a", "b"]
    assert [(record.path.name, record.label) for record in splits.train] == [("y.JPG", 0), ("x.png", 0), ("x.png", 1)]
    assert (len(splits.val), [record.label for record in splits.test]) == (0, [1])
    picture(tmp_path / "test" / "c" / "x.png")
    with pytest.raises(UserError, match="no such class in train"):
        ImageFolder(str(tmp_path)).read()


def test_folder_split_is_stratified_and_a_class_keeps_its_split(tmp_path, picture):
    for number in range(10):
        picture(tmp_path / "a" / f"{number}.png")
        picture(tmp_path / "b" / f"{number}.png")
    before = ImageFolder(str(tmp_path), val_fraction=0.1, test_fraction=0.3).read()
    for records, count in ((before.train, 6), (before.val, 1), (before.test, 3)):
        assert [sum(record.label == label for record in records) for label in (0, 1)] == [count, count]
    assert len({record.path for record in [*before.train, *before.val, *before.test]}) == 20
    picture(tmp_path / "aa" / "0.png")
    after = ImageFolder(str(tmp_path), val_fraction=0.1, test_fraction=0.3).read()
    assert [record.path for record in after.test] == [record.path for record in before.test]
    other = ImageFolder(str(tmp_path), val_fraction=0.1, test_fraction=0.3, seed=1).read()
    assert [record.path for record in other.test] != [record.path for record in before.test]


def test_folder_names_the_empty_class(tmp_path, picture):
    picture(tmp_path / "a" / "0.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="b: the class is empty"):
        ImageFolder(str(tmp_path)).read()


@pytest.fixture
def dtd(tmp_path, picture):
    """A function that writes a CoOp split file and its pictures under one spelling of the folder name."""

    def write(folder="dtd", **changes):
        content = {"train": [["b/1.png", 1, "bubbly"], ["a/1.png", 0, "banded"]], "val": [["a/2.png", 0, "banded"]], "test": []}
        for entry in [*content["train"], *content["val"]]:
            picture(tmp_path / folder / "images" / entry[0])
        (tmp_path / folder / "split_zhou_DescribableTextures.json").write_text(json.dumps(content | changes))
        return tmp_path

    return write


@pytest.mark.parametrize("spelling", ["dtd", "DTD"])
def test_coop_accepts_both_spellings(dtd, monkeypatch, spelling):
    monkeypatch.setenv("VISION_PEFT_DATA", str(dtd(spelling)))
    splits = CoopSplit("dtd").read()
    assert splits.class_names == ["banded", "bubbly"]
    assert [(record.path.relative_to(dtd(spelling)).as_posix(), record.label) for record in splits.train] == [
        (f"{spelling}/images/b/1.png", 1),
        (f"{spelling}/images/a/1.png", 0),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": [["a/9.png", 0, "banded"]]}, r"split_zhou_DescribableTextures\.json names .*images/a/9\.png, which does not exist"),
        ({"val": [["a/2.png", 0]]}, r"json, val\[0\]: expected \[picture, label, class name\]"),
        ({"val": [["a/2.png", 0, "dotted"]]}, r"json, val\[0\]: label 0 is 'dotted' here and 'banded' before"),
        ({"val": [["a/2.png", 3, "dotted"]]}, r"no picture has label 2"),
        ({"val": None}, r"json: no list 'val'"),
    ],
)
def test_coop_errors(dtd, changes, message):
    root = dtd(**changes) / "dtd"
    with pytest.raises(UserError, match=message):
        CoopSplit("dtd", str(root)).read()


def test_coop_missing_set_and_missing_split_file(tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path))
    with pytest.raises(UserError, match="no folder Food101 or food-101"):
        CoopSplit("food101")
    (tmp_path / "food-101").mkdir()
    with pytest.raises(UserError, match=r"split_zhou_Food101\.json: the split file is missing"):
        CoopSplit("food101")


def test_aircraft(tmp_path, picture):
    (tmp_path / "variants.txt").write_text("707-320\nSaab 340\n")
    for split, line in (("train", "1 Saab 340\n2 707-320"), ("val", "3 Saab 340"), ("test", "4 707-320")):
        (tmp_path / f"images_variant_{split}.txt").write_text(line + "\n")
    for number in range(1, 5):
        picture(tmp_path / "images" / f"{number}.jpg")
    splits = FgvcAircraft(str(tmp_path)).read()
    assert [(record.path.name, record.label) for record in splits.train] == [("1.jpg", 1), ("2.jpg", 0)]
    (tmp_path / "images_variant_val.txt").write_text("3 Saab 34\n")
    with pytest.raises(UserError, match=r"images_variant_val\.txt, line 1: 'Saab 34' is not in variants\.txt; did you mean Saab 340"):
        FgvcAircraft(str(tmp_path)).read()


def test_imagenet_uses_val_as_test_and_the_curated_names(tmp_path):
    for split in ("train", "val"):
        for number in range(1000):
            folder = tmp_path / "images" / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            (folder / "x.JPEG").touch()  # reading lists pictures, it decodes none
    splits = ImageNet(str(tmp_path)).read()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1000, 0, 1000)
    assert splits.class_names[:2] == ["tench", "goldfish"] and splits.test[1].label == 1


def test_digits_are_real_stratified_and_fixed():
    splits = Digits().read()
    everything = [*splits.train, *splits.val, *splits.test]
    assert len(everything) == len({record.path for record in everything}) == 1797
    assert [min(np.bincount([record.label for record in part])) for part in (splits.train, splits.val, splits.test)] == [104, 26, 44]
    first = splits.train[0]
    assert first.pixels.shape == (8, 8) and first.pixels.dtype == np.uint8 and first.pixels.max() == 255
    assert [record.path for record in Digits().read().test] == [record.path for record in splits.test]


def test_real_sets_have_the_documented_counts(real_set):
    for name, classes, counts in (("caltech101", 100, (1600, 400, 984)), ("dtd10", 10, (320, 80, 395))):
        splits = CsvSource(str(real_set(name) / "split.csv")).read()
        assert len(splits.class_names) == classes
        assert (len(splits.train), len(splits.val), len(splits.test)) == counts


def test_class_subset_renumbers_and_keeps_order():
    whole, part = Digits().read(), ClassSubset(Digits(), 3, 6).read()
    assert part.class_names == whole.class_names[3:6]
    for split in ("train", "val", "test"):
        expected = [(record.path, record.label - 3) for record in getattr(whole, split) if 3 <= record.label < 6]
        assert [(record.path, record.label) for record in getattr(part, split)] == expected
    with pytest.raises(UserError, match="start 3 and stop 3 are no range"):
        ClassSubset(Digits(), 3, 3)
    with pytest.raises(UserError, match="stop: 11, but Digits has 10 classes"):
        ClassSubset(Digits(), 0, 11).read()
