"""A quality-aware encoder trained in processes of its own: killed inside an epoch and resumed, on two processes, used as an expert."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

PICTURES = 41
BACKBONE = {"name": "test_resnet", "image_size": 32, "pretrained": False}
CONFIG = {
    "seed_everything": 1,
    "model": {
        "class_path": "QualityContrast",
        "init_args": {
            "backbone": {"class_path": "vision_peft.backbones.Vit", "init_args": BACKBONE},
            "queue": 40,
            "code": 8,
            "momentum": 0.9,
        },
    },
    "data": {"class_path": "PristineImages", "init_args": {"patch": 16, "distortions": 2, "batch_size": 2, "val_share": 0.85}},
    "adapter": {"method": {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.1}}, "targets": "all"},
    "trainer": {"max_steps": 7, "accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0},
    "checkpoint_every": 2,
}
WHOLE = ["--model.whole", "true", "--model.normalize", "none", "--adapter.method", "null"]


@pytest.fixture
def pictures(runner):
    (runner.folder / "p").mkdir()
    rows = ["path,mos"]
    for i in range(PICTURES):
        noise = np.random.default_rng(i).integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80, 80), Image.Resampling.BICUBIC).save(runner.folder / "p" / f"{i}.png")
        rows.append(f"p/{i}.png,{i}")
    (runner.folder / "scores.csv").write_text("\n".join([*rows, ""]))
    CONFIG["data"]["init_args"]["images"] = str(runner.folder / "p")
    (runner.folder / "quality.yaml").write_text(yaml.safe_dump(CONFIG))


def state(runner, run: str) -> dict[str, torch.Tensor]:
    return torch.load(runner.folder / run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("more", [[], WHOLE], ids=["adapted", "whole"])
def test_killed_and_resumed_equals_uninterrupted(runner, pictures, more):
    whole = runner("fit", "--config", "quality.yaml", "--run", "whole", *more)
    assert whole.returncode == 0, whole.stderr
    killer = ["--trainer.callbacks+", "killer.Killer", "--trainer.callbacks.step", "5"]
    killed = runner("fit", "--config", "quality.yaml", "--run", "killed", *more, *killer)
    assert killed.returncode == -9, killed.stderr
    resumed = runner("fit", "--resume", "killed", "--trainer.callbacks", "null")
    assert resumed.returncode == 0, resumed.stderr
    name = "encoder/encoder.safetensors" if more else "adapter/adapter_model.safetensors"
    expected, found = (load_file(runner.folder / run / name) for run in ("whole", "killed"))
    states = [state(runner, run) for run in ("whole", "killed")]
    for first, second in ((expected, found), states):
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), key
    assert any(key.startswith("queue.") for key in states[0]) and any(key.startswith("keys.") for key in states[0])


def test_two_processes_share_one_queue(runner, pictures):
    plain = ["--config", "quality.yaml", "--adapter.method.dropout", "0", "--trainer.max_steps", "3", "--data.val_share", "0.01"]
    one = runner("fit", *plain, "--run", "one", "--model.negatives", "queue")
    devices = ["--trainer.devices", "2", "--data.batch_size", "1", "--trainer.strategy", "ddp_find_unused_parameters_true"]
    two = runner("fit", *plain, "--run", "two", "--model.negatives", "queue", *devices)
    assert one.returncode == 0 and two.returncode == 0, two.stderr
    first, second = (state(runner, run) for run in ("one", "two"))
    assert int(first["queue.place"]) == int(second["queue.place"]) == 3 * 2 * 6
    for key in first:
        assert torch.allclose(first[key].float(), second[key].float(), atol=1e-4), key


def test_a_trained_adapter_is_an_expert(runner, pictures):
    """Its pretrained network is random here, and drawn anew by every process: what was put on other weights is refused."""
    fitted = runner("fit", "--config", "quality.yaml", "--run", "run", *WHOLE, "--trainer.max_steps", "1")
    assert fitted.returncode == 0, fitted.stderr
    extract = ["quality", "extract", "--scores", str(runner.folder / "scores.csv"), "--folder", "f"]
    done = runner(*extract, "--experts", "run/encoder", "random:test_vit")
    assert done.returncode == 0, done.stderr
    fit = runner("quality", "fit", "--scores", str(runner.folder / "scores.csv"), "--features", "f", "--divisions", "2", "--regressor", "r")
    assert fit.returncode == 0, fit.stderr
    facts = json.loads((runner.folder / "r" / "regressor.json").read_text())
    assert [each.get("folder") for each in facts["experts"]] == ["experts/0", None]
    (runner.folder / "run").rename(runner.folder / "elsewhere")
    scored = runner("quality", "score", "p/1.png", "--regressor", "r")
    assert scored.returncode == 0 and "p/1.png" in scored.stdout, scored.stderr
    refused = runner(*extract, "--experts", "elsewhere")
    assert refused.returncode == 2 and "elsewhere holds neither" in refused.stderr
