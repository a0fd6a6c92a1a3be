"""The eight sets with opinion scores, from small archives in their published layouts."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import xlsxwriter
from PIL import Image
from scipy.io import savemat

from vision_peft.cli import main
from vision_peft.data.known_sets import KNOWN_SETS
from vision_peft.quality.opinions import divide, read_opinions

RNG = np.random.default_rng(0)
Files = dict[str, bytes]
# what split.csv must say: {end of the path: (score, std, reference, split)}
Expected = dict[str, tuple[float, float | None, str | None, str | None]]


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    form = {"jpg": "JPEG"}.get(kind, kind)
    Image.fromarray(RNG.integers(0, 255, (6, 8, 3), dtype=np.uint8)).save(stream, form)
    return stream.getvalue()


def zipped(files: Files) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def matlab(**arrays: object) -> bytes:
    stream = io.BytesIO()
    savemat(stream, arrays)
    return stream.getvalue()


def cells(names: list[str], column: bool = False) -> np.ndarray:
    found = np.array(names, dtype=object)
    return found[:, None] if column else found[None]


def table(*rows: list[object]) -> bytes:
    return "\r\n".join(",".join(map(str, row)) for row in rows).encode()


def workbook(sheets: dict[str, dict[str, object]]) -> bytes:
    """Cells by address."""
    with xlsxwriter.Workbook(stream := io.BytesIO(), {"in_memory": True}) as book:
        for name, cells in sheets.items():
            sheet = book.add_worksheet(name)
            for address, value in cells.items():
                sheet.write(address, value)
    return stream.getvalue()


def koniq10k() -> tuple[dict[str, Files], Expected]:
    names = [f"{number}.jpg" for number in (10004473376, 10007357496, 9996001596)]
    scores = {name: (77.25 - place, None, None, None) for place, name in enumerate(names)}
    rows = [[name, 0, 0, 25, 73, 7, 105, 3.8 - place, 0.5, 77.25 - place] for place, name in enumerate(names)]
    listed = table(["image_name", "c1", "c2", "c3", "c4", "c5", "c_total", "MOS", "SD", "MOS_zscore"], *rows)
    pictures = {f"1024x768/{name}": encoded("jpg") for name in [*names, "unlisted.jpg"]}
    halves = {f"512x384/{name}": encoded("jpg") for name in names}
    archives = {"koniq10k_1024x768.zip": pictures | halves, "scores.zip": {"koniq10k_scores_and_distributions.csv": listed}}
    return archives, {f"1024x768/{name}": value for name, value in scores.items()}


def clive() -> tuple[dict[str, Files], Expected]:
    names = [*(f"t{i}.bmp" for i in range(1, 8)), "3.bmp", "4.bmp", "1164.JPG"]
    scores, deviations = RNG.uniform(0, 100, len(names)), RNG.uniform(10, 20, len(names))
    files = {f"ChallengeDB_release/Images/{'trainingImages/' if name[0] == 't' else ''}{name}": encoded("bmp") for name in names}
    data = {"AllImages_release": cells(names, column=True), "AllMOS_release": scores[None], "AllStdDev_release": deviations[None]}
    files |= {f"ChallengeDB_release/Data/{name}.mat": matlab(**{name: array}) for name, array in data.items()}
    return {"ChallengeDB_release.zip": files}, {names[i]: (scores[i], deviations[i], None, None) for i in range(7, 10)}


def flive() -> tuple[dict[str, Files], Expected]:
    splits = {"voc_emotic_ava/AVA__1.jpg": "train", "voc_emotic_ava/JPEGImages__2.jpg": "val", "blur_dataset/motion3.jpg": "train"}
    splits |= {"voc_emotic_ava/EMOTIC__4.jpg": "test"}
    names = [*splits, "EE371R/rq85.jpg"]
    files = {f"database/{name}": encoded("jpg") for name in names}
    files["database/patches/AVA__1.jpg_patch_1.jpg"] = encoded("jpg")
    files["labels_image.csv"] = table(["name", "mos"], *([name, 70.5 + i] for i, name in enumerate(names)))
    small = [[name, 60, split == "val"] for name, split in splits.items() if split != "test"]
    files["database/labels=640_padded.csv"] = table(["name_image", "mos_image", "is_valid"], *small)
    files["database/labels640.csv"] = table(["mos_image", "name_image"], *([60, name] for name in splits if splits[name] == "test"))
    return {"flive.zip": files}, {name: (70.5 + i, None, None, splits[name]) for i, name in enumerate(splits)}


def spaq() -> tuple[dict[str, Files], Expected]:
    names = [f"{i:05d}.jpg" for i in range(1, 5)]
    sheet = {"A1": "Image name", "B1": "MOS", "C1": "Brightness"}
    for row, name in enumerate(names, start=2):
        sheet |= {f"A{row}": name, f"B{row}": 48.86 + row, f"C{row}": 50}
    annotations = {"SPAQ/Annotations/MOS and Image attribute scores.xlsx": workbook({"Sheet1": sheet})}
    archives = {"TestImage.zip": {f"TestImage/{name}": encoded("jpg") for name in names}, "annotations.zip": annotations}
    return archives, {name: (48.86 + row, None, None, None) for row, name in enumerate(names, start=2)}


def live(realigned: bool = True) -> tuple[dict[str, Files], Expected]:
    counts = {"jp2k": 227, "jpeg": 233, "wn": 174, "gblur": 174, "fastfading": 174}
    names = [f"{folder}/img{i}.bmp" for folder, count in counts.items() for i in range(1, count + 1)]
    copies = np.arange(982) % 4 == 1
    copies[np.flatnonzero(copies)[203:]] = False
    plain, new, deviations = RNG.uniform(0, 100, 982), RNG.uniform(-3, 112, 982), RNG.uniform(1, 9, 982)
    deviations[copies] = np.nan
    references = [f"{('studentsculpture', 'rapids', 'dancers')[i % 3]}.bmp" for i in range(982)]
    same = encoded("bmp")
    files = {f"databaserelease2/{name}": same for name in names} | {"databaserelease2/refimgs/rapids.bmp": same}
    files["databaserelease2/dmos.mat"] = matlab(dmos=plain[None], orgs=copies[None].astype(np.uint8))
    files["databaserelease2/refnames_all.mat"] = matlab(refnames_all=cells(references))
    archives = {"databaserelease2.zip": files}
    if realigned:
        extra = matlab(dmos_new=new[None], dmos_std=deviations[None], orgs=copies[None].astype(float))  # 1.0 is 1
        archives["more.zip"] = {"dmos_realigned.mat": extra}
    scores, stds = (new, deviations) if realigned else (plain, [None] * 982)
    return archives, {names[i]: (-scores[i], stds[i], references[i], None) for i in range(982) if not copies[i]}


def csiq() -> tuple[dict[str, Files], Expected]:
    kinds = {"noise": "AWGN", "jpeg": "JPEG", "jpeg 2000": "jpeg2000", "fnoise": "fnoise", "blur": "BLUR", "contrast": "contrast"}
    heads = ["image", "dst_idx", "dst_type", "dst_lev", "dmos_std", "dmos"]
    sheet: dict[str, object] = {"A1": "CSIQ", **{f"{'DEFGHI'[i]}4": head for i, head in enumerate(heads)}}
    files, expected = {f"src_imgs/{image}.png": encoded("png") for image in ("1600", "woman")}, {}
    for row, (image, kind, level) in enumerate([(1600, kind, 1) for kind in kinds] + [("woman", "noise", 4)], start=5):
        dmos, std = 0.06 * row, 0.01 * row
        sheet |= {f"{'DEFGHI'[i]}{row}": value for i, value in enumerate([image, 1, kind, level, std, dmos])}
        name = f"{image}.{kinds[kind]}.{level}.png"
        files[f"dst_imgs/{kinds[kind].lower()}/{name}"] = encoded("png")
        expected[name] = (-dmos, std, f"{image}.png", None)
    book = workbook({"all_by_dist": {"A1": "nothing"}, "all_by_image": sheet})
    return {"dst_imgs.zip": files, "labels.zip": {"csiq.DMOS.xlsx": book}}, expected


def tid2013() -> tuple[dict[str, Files], Expected]:
    names = [f"{letter}{i:02d}_06_{level}.bmp" for letter, i in (("I", 1), ("i", 25)) for level in (1, 2, 3)]
    scores = {name: (5.51429 - i, 0.13 + i, f"I{name[1:3]}.BMP", None) for i, name in enumerate(names)}
    files = {f"tid2013/distorted_images/{name.replace('I01', 'i01')}": encoded("bmp") for name in names}
    files |= {"tid2013/reference_images/I01.BMP": encoded("bmp"), "tid2013/reference_images/i25.bmp": encoded("bmp")}
    files["tid2013/mos_with_names.txt"] = "".join(f"{value[0]} {name}\r\n" for name, value in scores.items()).encode()
    files["tid2013/mos_std.txt"] = "".join(f"{value[1]}\r\n" for value in scores.values()).encode()
    return {"tid2013.zip": files}, {name.replace("I01", "i01"): value for name, value in scores.items()}


def kadid10k() -> tuple[dict[str, Files], Expected]:
    names = [f"I{reference:02d}_{kind:02d}_01.png" for reference in (1, 2, 81) for kind in (1, 25)]
    scores = {name: (4.57 - i / 2, 0.496 + i, f"{name[:3]}.png", None) for i, name in enumerate(names)}
    files = {f"kadid10k/images/{name}": encoded("png") for name in [*names, "I01.png", "I02.png", "I81.png"]}
    files["kadid10k/dmos.csv"] = table(["dist_img", "ref_img", "dmos", "var"], *([n, v[2], v[0], v[1]] for n, v in scores.items()))
    return {"kadid10k.zip": files}, scores


MAKERS = {make.__name__: make for make in (koniq10k, clive, flive, spaq, live, csiq, tid2013, kadid10k)}
SYNTHETIC = ("live", "csiq", "tid2013", "kadid10k")


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path / "sets"))

    def run(name: str, archives: dict[str, Files], *more: str) -> int:
        given = []
        for file, files in archives.items():
            (tmp_path / file).write_bytes(zipped(files))
            given += ["--archive", str(tmp_path / file)]
        return main(["data", "prepare", name, *given, *more])

    return run


@pytest.fixture
def refused(prepare, tmp_path, capsys):
    """The one line of the error, after which nothing may be left."""

    def run(name: str, archives: dict[str, Files]) -> str:
        assert prepare(name, archives, "--accept_counts") == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vision-peft: error: ")]
        assert not (tmp_path / "sets").exists() or not list((tmp_path / "sets").iterdir())
        return line

    return run


def check(folder: Path, expected: Expected) -> None:
    opinions = read_opinions(str(folder / "split.csv"))
    found = {each.path.relative_to(folder / "images").as_posix(): each for each in opinions}
    assert found.keys() == expected.keys()
    for name, (score, std, reference, split) in expected.items():
        each = found[name]
        assert each.score == pytest.approx(score, abs=1e-12) and (each.reference, each.split) == (reference, split)
        assert each.std == (None if std is None else pytest.approx(std))
    assert {path.name for path in folder.iterdir()} == {"images", "split.csv"}
    kept = {path.relative_to(folder / "images").as_posix() for path in folder.rglob("*") if path.is_file() and path.name != "split.csv"}
    assert kept == expected.keys(), "a picture without a score is kept"


@pytest.mark.parametrize("name", [each for each in MAKERS if each != "live"])
def test_a_quality_set_is_prepared_and_read(name, prepare, tmp_path, capsys):
    archives, expected = MAKERS[name]()
    assert prepare(name, archives) == 2
    train = sum(value[3] in (None, "train") for value in expected.values())
    want = KNOWN_SETS[name].counts.train
    assert f"{name}: train {train} ({want - train} fewer than {want})" in capsys.readouterr().err
    assert not list((tmp_path / "sets").iterdir())
    with pytest.warns(UserWarning, match="fewer than"):
        assert prepare(name, archives, "--accept_counts") == 0
    capsys.readouterr()
    check(tmp_path / "sets" / name, expected)
    header = (tmp_path / "sets" / name / "split.csv").read_text().splitlines()[0].split(",")
    assert ("reference" in header) == (name in SYNTHETIC) and ("split" in header) == (name == "flive")
    assert prepare(name, archives) == 0
    assert f"{name} is already in" in capsys.readouterr().out


def test_the_pictures_are_those_of_the_archive(prepare, tmp_path):
    archives, expected = koniq10k()
    with pytest.warns(UserWarning):
        assert prepare("koniq10k", archives, "--accept_counts") == 0
    [pictures, _] = archives.values()
    for name in expected:
        assert (tmp_path / "sets" / "koniq10k" / "images" / name).read_bytes() == pictures[name]


def test_a_label_file_needs_no_archive(prepare, tmp_path):
    archives, expected = csiq()
    book = tmp_path / "csiq.DMOS.xlsx"
    book.write_bytes(archives.pop("labels.zip")[book.name])
    with pytest.warns(UserWarning):
        assert prepare("csiq", archives, "--archive", str(book), "--accept_counts") == 0
    check(tmp_path / "sets" / "csiq", expected)


@pytest.mark.parametrize("realigned", [True, False])
def test_live_has_all_its_pictures(realigned, prepare, tmp_path, capsys):
    """The whole of it, since the order of its arrays is the layout; the scores realigned by the authors are taken where they are."""
    archives, expected = live(realigned)
    assert prepare("live", archives) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "live: the counts are those recalled" in out and "train 779, val none, test none" in out
    assert len(expected) == 779
    check(tmp_path / "sets" / "live", expected)


def test_realigned_scores_of_another_release_are_refused(refused):
    archives, _ = live()
    others = np.zeros((1, 982))
    files = archives["more.zip"]
    files["dmos_realigned.mat"] = matlab(dmos_new=np.ones((1, 982)), dmos_std=np.ones((1, 982)), orgs=others)
    line = refused("live", archives)
    assert "dmos_realigned.mat: its array orgs, of the references, is not that of dmos.mat" in line


@pytest.mark.parametrize("name", ["csiq", "kadid10k", "tid2013"])
def test_divisions_keep_references_together(name, prepare, tmp_path):
    archives, _ = MAKERS[name]()
    with pytest.warns(UserWarning):
        assert prepare(name, archives, "--accept_counts") == 0
    opinions = read_opinions(f"{name}/split.csv")
    train, _, test = divide(opinions, (0.5, 0.0, 0.5), seed=1)
    assert train and test
    assert not {opinions[i].reference for i in train} & {opinions[i].reference for i in test}


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_label_file_is_named(name, refused):
    for file in KNOWN_SETS[name].placement.texts:
        archives, _ = MAKERS[name]()
        kept = {archive: {path: files[path] for path in files if Path(path).name != file} for archive, files in archives.items()}
        line = refused(name, kept)
        assert f"{file} is not in the archives given" in line and f"{name} comes as" in line


@pytest.mark.parametrize("name", MAKERS)
def test_a_picture_that_is_not_in_the_archives_is_named(name, refused):
    archives, expected = MAKERS[name]()
    lost = list(expected)[1]
    for files in archives.values():
        for path in [path for path in files if path.lower().endswith(lost.lower())]:
            del files[path]
    line = refused(name, archives)
    assert KNOWN_SETS[name].placement.texts[0] in line and f"not images/{lost}".lower() in line.lower() and "comes as" in line


@pytest.mark.parametrize("name, label", [("kadid10k", "dmos.csv"), ("tid2013", "mos_with_names.txt"), ("tid2013", "mos_std.txt")])
@pytest.mark.parametrize("wrong, words", [("good", "is 'good', not a number"), ("nan", "is nan, not a finite number")])
def test_a_score_that_is_no_number_is_named_with_its_line(name, label, wrong, words, refused):
    archives, expected = MAKERS[name]()
    [files] = archives.values()
    [path] = [path for path in files if path.endswith(label)]
    value = list(expected.values())[2][1 if label == "mos_std.txt" else 0]
    files[path] = files[path].replace(str(value).encode(), wrong.encode())
    line = refused(name, archives)
    assert f"{label}, line {4 if name == 'kadid10k' else 3}" in line and words in line


def test_numbers_of_workbooks_and_arrays_are_checked(refused):
    sheet = {"A1": "Image name", "B1": "MOS", "A2": "00001.jpg", "B2": "n/a", "A3": "00002.jpg"}
    pictures = {f"TestImage/0000{i}.jpg": encoded("jpg") for i in (1, 2)}
    book = "MOS and Image attribute scores.xlsx"
    assert f"{book}, row 2: MOS is 'n/a', not a number" in refused("spaq", {"a.zip": pictures | {book: workbook({"s": sheet})}})
    sheet["B2"] = 50.0
    assert f"{book}, row 3: MOS is missing" in refused("spaq", {"a.zip": pictures | {book: workbook({"s": sheet})}})
    archives, _ = clive()
    [files] = archives.values()
    files["ChallengeDB_release/Data/AllMOS_release.mat"] = matlab(AllMOS_release=np.array([[1.0] * 8 + [np.inf] + [2.0]]))
    assert "AllMOS_release.mat, AllMOS_release(9) is inf, not a finite number" in refused("clive", archives)


@pytest.mark.parametrize(
    "name, label, content, words",
    [
        ("kadid10k", "dmos.csv", b"dist_img,ref_img,mos\na.png,b.png,1", "no row names the columns dist_img, dmos, var, ref_img"),
        ("kadid10k", "dmos.csv", b"", "no row names the columns"),
        ("kadid10k", "dmos.csv", b"\xff\xfe\x00", "not a text file"),
        ("kadid10k", "dmos.csv", b"dist_img,ref_img,dmos,var\n", "names no picture of the set"),
        ("kadid10k", "dmos.csv", b"dist_img,ref_img,dmos,var\n../../x.png,r,1,1\n", "leads out of the set's folder"),
        ("kadid10k", "dmos.csv", b"dist_img,ref_img,dmos,var\nI01.png,r,1,1\ni01.png,r,2,1\n", "names i01.png 2 times"),
        ("kadid10k", "dmos.csv", b"dist_img,ref_img,dmos,var\n,r,1,1\n", "line 2: dist_img is missing"),
        ("tid2013", "mos_std.txt", b"0.1\n", "lists differ in length"),
        ("tid2013", "mos_with_names.txt", b"5.1\n" * 6, "line 1: '5.1' is not a score and a picture"),
        ("clive", "AllMOS_release.mat", b"nothing", "no MATLAB file, or a damaged one"),
        ("clive", "AllMOS_release.mat", matlab(AllMOS=np.ones(10)), "holds no array 'AllMOS_release'"),
        ("clive", "AllMOS_release.mat", matlab(AllMOS_release=np.ones(9)), "lists differ in length"),
        ("live", "dmos.mat", matlab(dmos=np.ones(10), orgs=np.zeros(10)), "release 2 has 982 entries"),
        ("live", "dmos_realigned.mat", b"nothing", "dmos_realigned.mat: no MATLAB file"),
        ("csiq", "csiq.DMOS.xlsx", b"nothing", "no .xlsx workbook, or a damaged one"),
        ("csiq", "csiq.DMOS.xlsx", zipped({"a": b""}), "no .xlsx workbook, or a damaged one"),
        ("csiq", "csiq.DMOS.xlsx", workbook({"s": {"A1": "x"}}), "without the sheet 'all_by_image' (sheets: s)"),
        ("flive", "labels=640_padded.csv", b"name_image,is_valid\na.jpg,2\n", "line 2: is_valid is '2', neither True nor False"),
    ],
)
def test_a_label_file_that_is_not_what_it_is_called(name, label, content, words, refused):
    archives, _ = MAKERS[name]()
    for files in archives.values():
        for path in files:
            if path.endswith(label):
                files[path] = content
    line = refused(name, archives)
    assert label in line and words in line


def test_a_kind_of_distortion_that_is_unknown(refused):
    archives, _ = csiq()
    heads = {f"{'DEFGH'[i]}4": head for i, head in enumerate(["image", "dst_type", "dst_lev", "dmos_std", "dmos"])}
    row = {f"{'DEFGH'[i]}5": value for i, value in enumerate([1600, "fog", 1, 0.1, 0.2])}
    archives["labels.zip"]["csiq.DMOS.xlsx"] = workbook({"all_by_image": heads | row})
    assert "row 5: dst_type is 'fog', expected one of noise, blur" in refused("csiq", archives)


def test_a_damaged_archive(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path / "sets"))
    archives, _ = kadid10k()
    whole = zipped(archives["kadid10k.zip"])
    place = whole.index(b"IHDR")  # in the first picture: found when it is unpacked, by its checksum
    for content in (whole[: len(whole) // 2], whole[:place] + b"XXXX" + whole[place + 4 :]):
        path = tmp_path / "kadid10k.zip"
        path.write_bytes(content)
        assert main(["data", "prepare", "kadid10k", "--archive", str(path), "--accept_counts"]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vision-peft: error: ")]
        assert str(path) in line and "damaged, cut short" in line
        assert not (tmp_path / "sets").exists() or not list((tmp_path / "sets").iterdir())


def test_a_set_that_has_lost_a_picture_is_told(prepare, tmp_path, capsys):
    archives, expected = kadid10k()
    with pytest.warns(UserWarning):
        assert prepare("kadid10k", archives, "--accept_counts") == 0
    (tmp_path / "sets" / "kadid10k" / "images" / next(iter(expected))).unlink()
    assert prepare("kadid10k", archives) == 2
    assert "is no whole kadid10k" in capsys.readouterr().err
