"""Sets from archives of the real layouts in small: every kind is read by its own source; damage, mistakes and kills leave nothing."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from vision_peft.cli import main
from vision_peft.data import CoopSplit, FgvcAircraft, ImageNet
from vision_peft.data.known_sets import KNOWN_SETS


def picture(value: int = 100) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(out, "JPEG")
    return out.getvalue()


def tar(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def splits(images: dict[str, int]) -> bytes:
    """A split file that puts every picture into all three lists but test, which gets the last."""
    entries = [[path, label, f"class {label}"] for path, label in images.items()]
    return json.dumps({"train": entries[:-2], "val": entries[-2:-1], "test": entries[-1:]}).encode()


CALTECH = {f"{name}/image_000{number}.jpg": label for label, name in enumerate(("crab", "anchor")) for number in (1, 2, 3)}
EUROSAT = {f"{name}/{name}_{number}.jpg": label for label, name in enumerate(("Forest", "River")) for number in (1, 2, 3)}
DTD = {f"{name}/{name}_00{number}.jpg": label for label, name in enumerate(("banded", "dotted")) for number in (1, 2, 3)}


def in_order(images: dict[str, int]) -> dict[str, int]:
    """So that each class has a training picture."""
    return dict(sorted(images.items(), key=lambda item: item[0][-5]))


@pytest.fixture
def archives(tmp_path) -> dict[str, list[str]]:
    """Archives by set, beside the split files that come with none of them."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    inner = tar({f"101_ObjectCategories/{path}": picture() for path in [*CALTECH, "BACKGROUND_Google/image_0001.jpg"]})
    aircraft = {f"fgvc-aircraft-2013b/data/images/{number:07d}.jpg": picture() for number in range(4)}
    lists = {"variants": "707-320\nA310\n", "images_variant_train": "0000000 707-320\n0000001 A310\n"}
    lists |= {"images_variant_val": "0000002 A310\n", "images_variant_test": "0000003 707-320\n"}
    aircraft |= {f"fgvc-aircraft-2013b/data/{name}.txt": text.encode() for name, text in lists.items()}
    wnids = [f"n{number:08d}" for number in range(1, 1001)]
    train = tar({f"{wnid}.tar": tar({f"{wnid}_1.JPEG": picture()}, "w") for wnid in wnids}, "w")
    val = tar({f"ILSVRC2012_val_{number:08d}.JPEG": picture() for number in range(1, 1001)}, "w")
    meta = io.BytesIO()
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O")]
    savemat(meta, {"synsets": np.array([(number, wnid) for number, wnid in enumerate(wnids, start=1)], dtype=kinds)})
    truth = "".join(f"{1001 - number}\n" for number in range(1, 1001)).encode()
    devkit = {"ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth, "x/data/meta.mat": meta.getvalue()}
    contents = {
        "caltech101": {"caltech-101.zip": zipped({"caltech-101/101_ObjectCategories.tar.gz": inner, "__MACOSX/._x.tar.gz": b"junk"})},
        "dtd": {"dtd-r1.0.1.tar.gz": tar({f"dtd/images/{path}": picture() for path in DTD})},
        "eurosat": {"EuroSAT.zip": zipped({f"2750/{path}": picture() for path in EUROSAT})},
        "fgvc_aircraft": {"fgvc-aircraft-2013b.tar.gz": tar(aircraft)},
        "imagenet": {"train.tar": train, "val.tar": val, "devkit.tar.gz": tar(devkit)},
    }
    for name, images in (("Caltech101", CALTECH), ("DescribableTextures", DTD), ("EuroSAT", EUROSAT)):
        (folder / f"split_zhou_{name}.json").write_bytes(splits(in_order(images)))
    found = {}
    for name, files in contents.items():
        for file, content in files.items():
            (folder / file).write_bytes(content)
        found[name] = [str(folder / file) for file in files]
    return found


def words(name: str, archives: list[str], root: Path, *more: str) -> list[str]:
    split = KNOWN_SETS[name].placement.split_file
    given = ["--splits", str(Path(archives[0]).parent / split)] if split else []
    given += [word for archive in archives for word in ("--archive", archive)]
    return ["data", "prepare", name, *given, "--root", str(root), *more]


SOURCES = {
    "caltech101": lambda folder: CoopSplit("caltech101", folder),
    "dtd": lambda folder: CoopSplit("dtd", folder),
    "eurosat": lambda folder: CoopSplit("eurosat", folder),
    "fgvc_aircraft": FgvcAircraft,
    "imagenet": ImageNet,
}


@pytest.fixture
def error_line(capsys):
    def run(argv: list[str]) -> str:
        capsys.readouterr()
        assert main(argv) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vision-peft: error: ")]
        return line.removeprefix("vision-peft: error: ")

    return run


@pytest.mark.parametrize("name", SOURCES)
def test_a_set_is_unpacked_and_read_by_its_source(name, archives, tmp_path, error_line, capsys):
    root = tmp_path / "data"
    line = error_line(words(name, archives[name], root))
    assert "not installed; with --accept_counts it is" in line and "fewer than" in line and "recalled" in line
    assert not list(root.iterdir())
    with pytest.warns(UserWarning, match="fewer than"):
        assert main(words(name, archives[name], root, "--accept_counts")) == 0
    [folder] = root.iterdir()
    assert folder.name == KNOWN_SETS[name].folders[0]
    read = SOURCES[name](str(folder)).read()
    records = [*read.train, *read.val, *read.test]
    assert all(record.path.read_bytes() == picture() for record in records[:5])
    assert len(records) == {"fgvc_aircraft": 4, "imagenet": 2000}.get(name, 6)
    if name == "imagenet":
        assert all(int(record.path.stem[-8:]) + int(record.path.parent.name[1:]) == 1001 for record in read.test)  # by the ground truth
    kept = sum(path.suffix.lower() in (".jpg", ".jpeg") for path in folder.rglob("*"))
    assert kept == len(records)  # what no list names is left out
    capsys.readouterr()
    assert main(words(name, archives[name], root)) == 0
    assert "is already in" in capsys.readouterr().out


def test_a_new_set_takes_the_old_ones_place(archives, tmp_path):
    root = tmp_path / "data"
    with pytest.warns(UserWarning):
        assert main(words("dtd", archives["dtd"], root, "--accept_counts")) == 0
    (root / "DTD" / "mark").touch()
    with pytest.warns(UserWarning):
        assert main(words("dtd", archives["dtd"], root, "--accept_counts", "--replace")) == 0
    assert not (root / "DTD" / "mark").exists() and [each.name for each in root.iterdir()] == ["DTD"]


def test_mistakes(archives, tmp_path, error_line):
    root, [dtd], [eurosat] = tmp_path / "data", archives["dtd"], archives["eurosat"]
    cases = {
        "unknown set 'dtdd'": ["data", "prepare", "dtdd", "--archive", dtd, "--root", str(root)],
        "is no file": words("dtd", [dtd + "x"], root),
        "none of its 6 pictures is in the archives given": words("dtd", [eurosat], root),
        "split_zhou_DescribableTextures.json is not in": ["data", "prepare", "dtd", "--archive", dtd, "--root", str(root)],
        "no val picture is in the archives given": words("imagenet", [archives["imagenet"][0], archives["imagenet"][2]], root),
        "has no such file": words("imagenet", archives["imagenet"], root, "--splits", dtd),
    }
    for message, argv in cases.items():
        assert message in error_line(argv)
    assert not root.exists() or not list(root.iterdir())


@pytest.mark.parametrize("kind", ["cut", "flipped", "text", "leads out", "link"])
def test_archives_that_are_not_to_be_trusted(kind, archives, tmp_path, error_line):
    root, path = tmp_path / "data", Path(archives["dtd"][0])
    whole = path.read_bytes()
    if kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "flipped":  # gzip's checksum does not match
        path.write_bytes(whole[:-8] + bytes(8 * [7]))
    elif kind == "text":
        path.write_bytes(b"<html>not found</html>")
    elif kind == "leads out":
        path.write_bytes(tar({"../evil.jpg": picture(), **{f"dtd/images/{name}": picture() for name in DTD}}))
    else:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            for name in DTD:
                info = tarfile.TarInfo(f"dtd/images/{name}")
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(info)
        path.write_bytes(out.getvalue())
    line = error_line(words("dtd", [str(path)], root, "--accept_counts"))
    expected = {"leads out": "leads out of the folder", "link": "none of its 6 pictures is in the archives"}.get(kind, "damaged, cut short")
    assert expected in line and (path.name in line or kind == "link")
    assert not list(tmp_path.rglob("evil.jpg"))
    assert not root.exists() or not list(root.iterdir())


def test_a_kill_in_the_middle_leaves_nothing_that_counts(archives, tmp_path):
    root = tmp_path / "data"
    argv = words("imagenet", archives["imagenet"], root, "--accept_counts")
    process = subprocess.Popen([sys.executable, "-m", "vision_peft.cli", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(root.glob(".imagenet.unpacking.*/train/n00000005")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (root / "imagenet").exists() and list(root.glob(".imagenet.unpacking.*"))
    with pytest.warns(UserWarning):
        assert main(argv) == 0
    assert [each.name for each in root.iterdir()] == ["imagenet"]
    assert len(ImageNet(str(root / "imagenet")).read().train) == 1000


def test_an_old_set_that_was_moved_aside_comes_back(archives, tmp_path, capsys):
    root = tmp_path / "data"
    with pytest.warns(UserWarning):
        assert main(words("dtd", archives["dtd"], root, "--accept_counts")) == 0
    os.rename(root / "DTD", root / ".DTD.old.elsewhere.7")
    assert main(words("dtd", archives["dtd"], root)) == 0
    out = capsys.readouterr().out
    assert "put" in out and "is already in" in out and [each.name for each in root.iterdir()] == ["DTD"]


def test_the_list_tells_what_is_there(archives, tmp_path, capsys):
    root = tmp_path / "data"
    with pytest.warns(UserWarning):
        assert main(words("eurosat", archives["eurosat"], root, "--accept_counts")) == 0
    assert main(["data", "list", "--root", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("eurosat") and line.split()[1] == "eurosat" for line in lines)
    assert any(line.startswith("imagenet") and line.split()[1] == "-" for line in lines)
