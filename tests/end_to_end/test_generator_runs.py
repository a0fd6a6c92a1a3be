"""Adaptation of a generator in processes of its own: killed inside an epoch and resumed, and the adapter as merged weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from generators import unconditional
from PIL import Image

VIT = {"class_path": "vision_peft.backbones.Vit", "init_args": {"name": "test_vit", "pretrained": False, "image_size": 32}}
TASKS = {
    "DiffusionFineTuning": ({"average": 0.9}, {"class_path": "GeneratorImages", "init_args": {"prompt": ""}}),
    "HybridDomainAdaptation": (
        {"encoders": [VIT], "average": 0.9, "measured": 2},
        {"class_path": "TargetDomains", "init_args": {"domains": ["a", "b"], "split": None, "held_out": None, "sources": 10}},
    ),
}


@pytest.fixture
def configured(runner):
    """A config for each task, in the runner's folder."""
    unconditional(runner.folder / "generator")
    rows = ["path,domain"]
    for index in range(10):
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(runner.folder / f"{index}.png")
        rows.append(f"{index}.png,{'ab'[index % 2]}")
    (runner.folder / "pictures.csv").write_text("\n".join([*rows, ""]))
    backbone = {"class_path": "vision_peft.backbones.Diffusion", "init_args": {"name": str(runner.folder / "generator")}}
    for task, (model, data) in TASKS.items():
        own = {**data["init_args"], "images": str(runner.folder / "pictures.csv"), "batch_size": 2}
        settings = {
            "seed_everything": 1,
            "model": {"class_path": task, "init_args": {"backbone": backbone, "samples": 2, "sample_steps": 2, **model}},
            "data": {"class_path": data["class_path"], "init_args": own},
            "adapter": {"method": {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.1}}, "targets": "attn"},
            "trainer": {"max_steps": 8, "accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0},
            "checkpoint_every": 2,
        }
        (runner.folder / f"{task}.yaml").write_text(yaml.safe_dump(settings))
    return runner


@pytest.mark.parametrize("task", TASKS)
def test_killed_and_resumed_equals_uninterrupted(configured, task):
    whole = configured("fit", "--config", f"{task}.yaml", "--run", "whole")
    assert whole.returncode == 0, whole.stderr
    killer = ["--trainer.callbacks+", "killer.Killer", "--trainer.callbacks.step", "7"]
    killed = configured("fit", "--config", f"{task}.yaml", "--run", "killed", *killer)
    assert killed.returncode == -9, killed.stderr
    resumed = configured("fit", "--resume", "killed", "--trainer.callbacks", "null")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = configured.adapter("whole"), configured.adapter("killed")
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert (configured.folder / "killed" / "samples" / "last.png").read_bytes() == (
        configured.folder / "whole" / "samples" / "last.png"
    ).read_bytes()
