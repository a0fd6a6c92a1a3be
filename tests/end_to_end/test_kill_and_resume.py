"""A run that is killed and resumed ends with the adapter of a run that was left alone, bit for bit."""

from __future__ import annotations

import random

import torch

# dropout and augmentation, so that both random streams must continue where they were; 4 batches an epoch, a checkpoint every 4 steps
# of a run that began at 0: kills fall inside epochs and between checkpoints
RANDOM = ["--adapter.method.dropout", "0.2", "--data.augment", "clip_lora"]


def test_killed_and_resumed_equals_uninterrupted(runner):
    whole = runner.fit("whole", *RANDOM, "--checkpoint_every", "3")
    assert whole.returncode == 0, whole.stderr
    step = random.randrange(4, 12)
    killed = runner.fit(
        "killed", *RANDOM, "--checkpoint_every", "3", "--trainer.callbacks+", "killer.Killer", "--trainer.callbacks.step", str(step)
    )
    assert killed.returncode == -9, f"killed at step {step}: {killed.stderr}"
    assert not (runner.folder / "killed" / "adapter").exists()
    resumed = runner("fit", "--resume", "killed", "--trainer.callbacks", "null")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = runner.adapter("whole"), runner.adapter("killed")
    assert expected.keys() == found.keys()
    for key in expected:
        assert torch.equal(expected[key], found[key]), f"{key} differs after a kill at step {step}"


def test_checkpoint_holds_trained_tensors_and_resumes_strictly(runner):
    done = runner.fit("run")
    assert done.returncode == 0, done.stderr
    path = runner.folder / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"adapters", "head"}
    numbers = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    assert path.stat().st_size < 3.2 * 4 * numbers + 200_000  # values, two moments, schedules

    checkpoint["state_dict"].pop("head.bias")
    torch.save(checkpoint, path)
    broken = runner("fit", "--resume", "run")
    assert broken.returncode == 2
    assert broken.stderr.splitlines()[-1] == "vision-peft: error: run/checkpoints/last.ckpt: trained key 'head.bias' is missing"

    path.write_bytes(path.read_bytes()[:2000])
    truncated = runner("fit", "--resume", "run")
    assert truncated.returncode == 2 and "last.ckpt: not a complete checkpoint" in truncated.stderr, truncated.stderr


def test_same_seed_same_adapter_and_a_second_run_keeps_the_first(runner):
    assert runner.fit("run", *RANDOM).returncode == 0
    assert runner.fit("run", *RANDOM).returncode == 0
    first, second = runner.adapter("run"), runner.adapter("run-2")
    assert all(torch.equal(first[key], second[key]) for key in first)
