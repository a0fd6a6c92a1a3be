"""Whole runs through the command line, as a user starts them, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

CONFIG = """
seed_everything: 3
model:
  class_path: FewShotClassification
  init_args:
    backbone: {class_path: vision_peft.backbones.Vit, init_args: {name: test_vit, image_size: 32, pretrained: false}}
    head: {class_path: LinearHead, init_args: {init: zeros}}
data:
  class_path: FewShotImages
  init_args: {source: {class_path: Digits}, shots: 8, batch_size: 16, augment: none}
adapter:
  method: {class_path: LoRA, init_args: {rank: 4}}
  targets: attn+mlp
trainer:
  max_steps: 13
  accelerator: cpu
  enable_progress_bar: false
  limit_val_batches: 0
checkpoint_every: 4
"""

KILLER = """
import os, signal
import lightning.pytorch as pl

class Killer(pl.Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
"""


class Runner:
    """Starts `vision-peft` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "run.yaml").write_text(CONFIG)
        (folder / "killer.py").write_text(KILLER)

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "vision_peft.cli", *words]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300)

    def fit(self, run: str, *words: str) -> subprocess.CompletedProcess[str]:
        return self("fit", "--config", "run.yaml", "--run", run, *words)

    def adapter(self, run: str) -> dict[str, Tensor]:
        return load_file(self.folder / run / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)
