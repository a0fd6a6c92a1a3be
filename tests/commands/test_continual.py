"""continual: the matrix against an independent evaluation, a kill in the middle, methods without a rank, what is refused."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

from vision_peft.backbones import Clip
from vision_peft.cli import main
from vision_peft.data import ClassSubset, Digits
from vision_peft.data.fewshot_images import FewShotImages

TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2},
}
RANGES = {"low": (0, 3), "middle": (3, 6), "high": (6, 10)}
KILLER = """
import os, signal
import lightning.pytorch as pl

class KillAt(pl.Callback):
    def on_train_batch_end(self, trainer, task, *args):
        if os.environ.get("KILL_AT") == f"{task.seen_classes}:{trainer.global_step}":
            os.kill(os.getpid(), signal.SIGKILL)
"""

VIT = "{class_path: vision_peft.backbones.Vit, init_args: {name: test_vit, pretrained: false, image_size: 32}}"
ANOTHER_TASK = f"{{class_path: FewShotClassification, init_args: {{backbone: {VIT}}}}}"


def source(start: int, stop: int) -> dict:
    return {"class_path": "ClassSubset", "init_args": {"source": {"class_path": "Digits"}, "start": start, "stop": stop}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """task.yaml, sequence.yaml, killer.py and the weights of a tiny CLIP that sees differences between pictures."""
    folder = tmp_path_factory.mktemp("sequence")
    (folder / "tiny.json").write_text(json.dumps(TINY_CLIP))
    with pytest.warns(UserWarning, match="random"):
        backbone = Clip(config=str(folder / "tiny.json"))
        backbone.load()
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.network.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1, generator=generator)
    torch.nn.init.normal_(backbone.network.visual.conv1.weight, generator=generator)
    torch.nn.init.normal_(backbone.network.token_embedding.weight, generator=generator)
    backbone.network.logit_scale.data.fill_(3.0)
    save_file(backbone.network.state_dict(), folder / "weights.safetensors")
    arguments = {"config": str(folder / "tiny.json"), "weights": str(folder / "weights.safetensors")}
    task = {
        "seed_everything": 3,
        "model": {
            "class_path": "ContinualClassification",
            "init_args": {
                "backbone": {"class_path": "vision_peft.backbones.Clip", "init_args": arguments},
                "head": {"class_path": "TextHead", "init_args": {"scale": "learned"}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
                "cache": "off",
            },
        },
        "data": {"class_path": "FewShotImages", "init_args": {"source": source(0, 3), "shots": 4, "batch_size": 4, "augment": "none"}},
        "adapter": {
            "method": {"class_path": "CoDyRA", "init_args": {"rank": 4, "levels": 2, "kappa": 0.5}},
            "targets": ["vision.*.attn.{q,v}", "text.*.mlp.fc1"],
        },
        "trainer": {"max_steps": 8, "accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0},
        "checkpoint_every": 2,
    }
    task["trainer"]["callbacks"] = [{"class_path": "killer.KillAt"}]
    entries = [{"name": name, "source": source(*limits), "template": f"{name} {{}}."} for name, limits in RANGES.items()]
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    (folder / "sequence.yaml").write_text(yaml.safe_dump({"tasks": entries}))
    (folder / "killer.py").write_text(KILLER)
    return folder


def continual(folder: Path, run: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vision_peft.cli", "continual", "--config", "task.yaml", "--sequence", "sequence.yaml", "--run", run]
    own = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([*command, *words], cwd=folder, env=own, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    done = continual(folder, "whole")
    assert done.returncode == 0, done.stderr
    assert "Transfer" in done.stdout and "Forgetting" in done.stdout
    return folder / "whole"


def test_the_last_row_is_what_the_merged_weights_give(folder, whole):
    state = json.loads((whole / "sequence.json").read_text())
    for weights, row in ((folder / "weights.safetensors", state["zero_shot"]), (whole / "merged" / "03.safetensors", state["rows"][-1])):
        backbone = Clip(config=str(folder / "tiny.json"), weights=str(weights))
        backbone.load()
        backbone.eval()
        sets = {name: FewShotImages(ClassSubset(Digits(), *limits), template=f"{name} {{}}.") for name, limits in RANGES.items()}
        prompts = [prompt for data in sets.values() for prompt in data.prompts()]
        text = F.normalize(backbone.encode_text(backbone.tokenize(prompts)), dim=1).detach()
        for place, (name, data) in enumerate(sets.items()):
            data.preprocess = backbone.preprocess
            data.setup("test")
            start, stop = RANGES[name]
            with torch.no_grad():
                scores = torch.cat([F.normalize(backbone(images), dim=1) @ text.mT for images, _ in data.test_dataloader()])
            labels = torch.tensor([record.label for record in data.test_records])
            known = (scores[:, start:stop].argmax(1) == labels).float().mean().item()
            union = (scores.argmax(1) == labels + start).float().mean().item()
            assert row["known"][place] == pytest.approx(known, abs=1e-5)
            assert row["union"][place] == pytest.approx(union, abs=1e-5) and union <= known
    assert [each.name for each in (whole / "merged").iterdir()] == ["03.safetensors"]


def test_ranks_and_norms_are_those_of_the_updates(folder, whole):
    row = json.loads((whole / "sequence.json").read_text())["rows"][0]
    assert len(row["ranks"]) == 2 * 2 + 2 and all(0 <= rank <= 4 for rank in row["ranks"].values())
    assert len(set(row["ranks"].values())) > 1  # the threshold has dropped some
    assert row["update"] == pytest.approx(row["drift"], rel=1e-4) and row["update"] > 0  # the first task starts at the start
    lines = list(csv.DictReader((whole / "matrix.csv").open()))
    assert len(lines) == 2 * 4 * 3
    assert all((whole / name).stat().st_size > 5000 for name in ("matrix.png", "ranks.png"))


@pytest.mark.parametrize("moment", ["3:5", "6:1"])  # after 3 classes a checkpoint is there, after 6 none yet
def test_killed_and_started_again_equals_uninterrupted(folder, whole, moment):
    run = f"killed-{moment[0]}"
    killed = continual(folder, run, KILL_AT=moment)
    assert killed.returncode == -9, killed.stderr
    assert len(json.loads((folder / run / "sequence.json").read_text())["rows"]) == int(moment[0]) // 3
    again = continual(folder, run)
    assert again.returncode == 0, again.stderr
    assert (folder / run / "sequence.json").read_text() == (whole / "sequence.json").read_text()
    found, expected = (load_file(place / "merged" / "03.safetensors") for place in (folder / run, whole))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    untouched = (folder / run / "merged" / "03.safetensors").stat().st_mtime_ns
    assert continual(folder, run).returncode == 0  # a finished sequence only prints its tables
    assert (folder / run / "merged" / "03.safetensors").stat().st_mtime_ns == untouched


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def words(*more: str, sequence: str = "sequence.yaml", run: str = "refused") -> list[str]:
    return ["continual", "--config", "task.yaml", "--sequence", sequence, "--run", run, *more]


def test_a_method_without_ranks_has_no_picture_of_them(here, folder, capsys):
    more = ["--adapter.method", "BitFit", "--trainer.max_steps", "1"]
    assert main(words(*more, run="bitfit")) == 0
    assert "No picture of ranks" in capsys.readouterr().out
    assert not (folder / "bitfit" / "ranks.png").exists() and (folder / "bitfit" / "matrix.png").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--adapter.method", "null"], "adapter.method: a sequence needs a method"),
        (["--model", ANOTHER_TASK, "--adapter.targets", "vision.5.*"], "a sequence is trained by ContinualClassification"),
        (["--trainer.devices", "2"], "trainer.devices: a sequence runs in one process"),
        (["--trainer.max_stepz", "2"], "max_stepz"),
    ],
)
def test_what_is_refused(here, folder, error_line, more, message):
    assert message in error_line(words(*more))
    assert not (folder / "refused").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "a b"}, "tasks[0].name: 'a b' is not a word"),
        ({"name": "middle"}, "two tasks are called 'middle'"),
        ({"templat": "x"}, "tasks[0]: unknown key 'templat'; did you mean template?"),
        ({"template": "x"}, "tasks[0].template: 'x' must contain {} once"),
        ({"source": "Digits"}, "tasks[0].source: give class_path"),
        ({"shots": 0}, "tasks[0].shots: 0 is not a number"),
        ({"source": source(5, 20)}, "data.source.stop: 20, but Digits has 10 classes"),
    ],
)
def test_mistakes_in_the_sequence(here, folder, error_line, change, message):
    tree = yaml.safe_load((folder / "sequence.yaml").read_text())
    tree["tasks"][0] |= change
    (folder / "wrong.yaml").write_text(yaml.safe_dump(tree))
    assert message in error_line(words(sequence="wrong.yaml"))
    assert not (folder / "refused").exists()


def test_another_plan_in_the_same_folder(here, folder, whole, error_line):
    assert "holds a sequence of other tasks or another configuration" in error_line(words("--data.shots", "2", run="whole"))
