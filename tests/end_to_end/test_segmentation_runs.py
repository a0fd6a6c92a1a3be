"""Segmentation runs in processes of their own: killed inside an epoch and resumed, and on two processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

CONFIG = {
    "seed_everything": 1,
    "model": {
        "class_path": "PromptableSegmentation",
        "init_args": {"backbone": {"class_path": "vision_peft.backbones.Sam", "init_args": {"name": "tiny", "image_size": 64}}},
    },
    "adapter": {"method": {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.1}}, "targets": "qv", "train": ["decoder.*"]},
    "trainer": {"max_steps": 7, "accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0},
    "checkpoint_every": 2,
}


def write_set(runner, **options) -> None:
    rows = ["image,mask,split"]
    for i in range(8):
        mask = np.zeros((30, 40), np.uint8)
        mask[i : i + 12, 8:30] = 1
        Image.fromarray(np.random.default_rng(i).integers(0, 200, (30, 40, 3), dtype=np.uint8)).save(runner.folder / f"{i}.png")
        Image.fromarray(mask).save(runner.folder / f"{i}_mask.png")
        rows.append(f"{i}.png,{i}_mask.png,{'val' if i > 5 else 'train'}")
    (runner.folder / "split.csv").write_text("\n".join(rows) + "\n")
    data = {"file": str(runner.folder / "split.csv"), **options}
    (runner.folder / "seg.yaml").write_text(yaml.safe_dump({**CONFIG, "data": {"class_path": "SegmentationImages", "init_args": data}}))


@pytest.mark.parametrize("patch", [None, 24])
def test_killed_and_resumed_equals_uninterrupted(runner, patch):
    write_set(runner, batch_size=2, patch=patch)  # 3 batches an epoch
    whole = runner("fit", "--config", "seg.yaml", "--run", "whole")
    assert whole.returncode == 0, whole.stderr
    killer = ["--trainer.callbacks+", "killer.Killer", "--trainer.callbacks.step", "5"]
    killed = runner("fit", "--config", "seg.yaml", "--run", "killed", *killer)
    assert killed.returncode == -9, killed.stderr
    resumed = runner("fit", "--resume", "killed", "--trainer.callbacks", "null")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = runner.adapter("whole"), runner.adapter("killed")
    assert expected.keys() == found.keys() and any(key.startswith("beside.trained.") for key in expected)
    for key in expected:
        assert torch.equal(expected[key], found[key]), key


def test_two_processes_equal_one_and_choose_the_threshold_together(runner):
    write_set(runner, batch_size=4, augment="none")
    # not Adam: where a gradient is rounding alone, its steps have the size of the others and any sign
    sgd = ["--model.optimizer", "{class_path: torch.optim.SGD, init_args: {lr: 1.0}}"]
    plain = ["--config", "seg.yaml", "--adapter.method.dropout", "0", "--model.cache", "off", *sgd]
    one = runner("fit", *plain, "--run", "one")
    assert one.returncode == 0, one.stderr
    devices = ["--trainer.devices", "2", "--data.batch_size", "2", "--trainer.strategy"]
    refused = runner("fit", *plain, "--run", "none", *devices, "ddp")
    assert refused.returncode == 2 and "trainer.strategy: set it to ddp_find_unused_parameters_true" in refused.stderr
    two = runner("fit", *plain, "--run", "two", *devices, "ddp_find_unused_parameters_true")
    assert two.returncode == 0, two.stderr
    expected, found = runner.adapter("one"), runner.adapter("two")
    assert max(float((expected[key] - found[key]).abs().max()) for key in expected) < 1e-4
    assert max(float(expected[key].abs().max()) for key in expected if key.endswith(".B")) > 1e-3, "nothing was trained"
    assert torch.equal(expected["parts.operating_point.threshold"], found["parts.operating_point.threshold"])
