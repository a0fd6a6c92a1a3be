"""Write a low-rank adapter set as a LoRA file of diffusers, as its pipelines and models read it.

Factors are those of PEFT's layout, with every scale folded into B. A file of factors alone has alpha = rank in diffusers (from 0.40 on also
where ranks differ) and in every other program that reads the layout, so that there is no alpha to be lost (diffusers forgets it where
metadata are missing).
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from vision_peft.engine.install import _find, _known
from vision_peft.engine.peft_layout import _factors, _targets
from vision_peft.engine.store import staged_folder
from vision_peft.errors import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"


def prefix_of(network: nn.Module) -> str:
    """What keys of this denoiser begin with in a pipeline's LoRA file.

    Raises:
        UserError: diffusers gives this class no LoRA of its own (UNet2DModel, DiT, PixArt).
    """
    if not hasattr(network, "load_lora_adapter"):
        raise UserError(f"diffusers loads no LoRA into a {type(network).__name__}: use --to pipeline, --to merged or the adapter folder")
    return "unet" if hasattr(network, "down_blocks") else "transformer"


def save_diffusers(folder: str | os.PathLike[str], network: nn.Module, *, name: str = "default") -> Path:
    """Write the adapter set `name` of a denoiser to FOLDER/pytorch_lora_weights.safetensors.

    `pipeline.load_lora_weights(folder)` and `network.load_lora_adapter(folder, prefix=..., weight_name=WEIGHTS)` then compute the same in
    eval mode. An existing folder is replaced only when all is written, and only if it holds such a file and nothing else.

    Raises:
        UserError: for a method that is not low-rank, a site that PEFT's layers cannot hold, a class without LoRA in diffusers, or a folder
            of something else. Nothing is written then.
    """
    prefix = prefix_of(network)
    found = _find(network)
    _known(found, name)
    if not found.sets[name].method.low_rank:
        raise UserError(f"method {found.sets[name].method.name} is not a low-rank update: use --to pipeline, or --rank")
    targets = _targets(network, _factors(found, name))
    if bare := [each for each in targets if each.parameter]:
        raise UserError(f"{bare[0].path}.{bare[0].parameter}: diffusers' LoRA has no place for bare parameters: leave them out of targets")
    if grouped := [each for each in targets if getattr(network.get_submodule(each.path), "groups", 1) > 1]:
        # diffusers takes the rank from B's second dimension, which is rank / groups here, and fails when it loads the file
        why = "diffusers cannot load a LoRA of a grouped convolution"
        raise UserError(f"{grouped[0].path}: {why}: use --to pipeline, or leave it out of targets")
    tensors = {f"{prefix}.{each.path}.{key}": value for each in targets for key, value in each.tensors.items()}
    with staged_folder(folder, frozenset({WEIGHTS}), "a folder of a diffusers LoRA") as staging:
        save_file({key: value.float().cpu().contiguous().clone() for key, value in tensors.items()}, staging / WEIGHTS, {"format": "pt"})
    return Path(folder)
