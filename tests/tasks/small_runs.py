"""Tiny backbones, the digits and runs of a few steps, in this process."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from vision_peft.adapters.lora import LoRA
from vision_peft.backbones.clip import Clip
from vision_peft.backbones.vit import Vit
from vision_peft.data import Digits
from vision_peft.data.fewshot_images import FewShotImages
from vision_peft.engine.adapter import Method
from vision_peft.engine.callback import AdapterCallback
from vision_peft.tasks.fewshot_classification import FewShotClassification

TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2},
}


def vit(seed: int = 0, name: str = "test_vit") -> Vit:
    """Loaded, with random weights that the seed alone decides."""
    backbone = Vit(name, image_size=32, pretrained=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone.load()
        for parameter in backbone.network.parameters():
            if not parameter.any():  # timm starts residual branches of a ResNet at zero, which would hide their layers
                nn.init.normal_(parameter, std=0.3)
    return backbone


def clip(folder: Path) -> Clip:
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY_CLIP))
    backbone = Clip(config=str(path))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        backbone.load()
        for parameter in backbone.network.parameters():  # open_clip starts biases at 0 and leaves some tensors uninitialised
            nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
        nn.init.normal_(backbone.network.visual.conv1.weight)  # pictures must differ by more than they share
        nn.init.normal_(backbone.network.token_embedding.weight)
    return backbone


def digits(**options: Any) -> FewShotImages:
    return FewShotImages(Digits(), **{"shots": 2, "batch_size": 8, "eval_batch_size": 64, "augment": "none", **options})


def adam(lr: float = 1e-2) -> Any:
    return lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.01)


def trainer(folder: Path, callbacks: list[pl.Callback] | None = None, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_steps": 4, "limit_val_batches": 0, **quiet}
    return pl.Trainer(default_root_dir=folder, callbacks=callbacks or [], **{**defaults, **options})


def fit(
    folder: Path, task: FewShotClassification, data: FewShotImages, method: Method | None = None, targets: Any = "attn+mlp", **options: Any
) -> AdapterCallback:
    """Train, and give the adapter callback (which knows the adapters)."""
    adapter = AdapterCallback(method, targets)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(folder, [adapter, *options.pop("callbacks", [])], **options).fit(task, datamodule=data)
    return adapter


def lora(rank: int = 2, dropout: float = 0.0) -> LoRA:
    return LoRA(rank=rank, alpha=4.0, dropout=dropout)


def trained(task: FewShotClassification) -> dict[str, Tensor]:
    """What a checkpoint would hold: the values of the task's parts."""
    return {f"{name}.{key}": value.clone() for name, part in task.parts.items() for key, value in part.state_dict().items()}
