"""One feature of one text, by MiniLM or by the text tower of an open_clip model."""

from __future__ import annotations

import torch
from torch import Tensor

from vision_peft.backbones import minilm


@torch.no_grad()
def text_feature(encoder: str, weights: str | None, text: str) -> Tensor:
    """(D,), unit length, float32.

    Args:
        encoder: `offline:minilm_l6` (D = 384), or an open_clip name (ViT-B-32: D = 512) with its `weights`, a tag or a file.

    Raises:
        UserError: unknown name, or weights that cannot be had.
    """
    if encoder == minilm.NAME:
        tower = minilm.MiniLm().eval()
        tower.load()
        return tower(minilm.tokenize([text]))[0].float()
    from vision_peft.backbones.clip import Clip

    clip = Clip(encoder, weights=weights)
    clip.load()
    clip.eval()
    return torch.nn.functional.normalize(clip.text_features([text], frozen=True)[0].float(), dim=0)
