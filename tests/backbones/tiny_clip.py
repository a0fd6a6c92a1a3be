"""Towers of every kind that open_clip builds, small enough for a test, with every tensor of influence."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import open_clip
import torch
from torch import nn

from vision_peft.backbones.clip import Clip

VISION = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 3}
TINY = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
PROMPTS = ["a photo of a cat.", "a photo of a three-toed sloth.", "a photo of a dog."]

# the text towers by how they pool; the last two need every column
CAUSAL_EOS = {**TINY, "custom_text": True, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407}}
CAUSAL_BIAS = {**TINY, "custom_text": True, "text_cfg": {**TEXT, "proj_bias": True}}
BIDIRECTIONAL = {**TINY, "custom_text": True, "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"}}
COCA = {
    **TINY,
    "custom_text": True,
    "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5, "output_tokens": True},
    "text_cfg": {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2, "attn_pooler_heads": 4},
}
RESNET = {**TINY, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 224}
KINDS = {"flat": TINY, "eos": CAUSAL_EOS, "bias": CAUSAL_BIAS, "bidirectional": BIDIRECTIONAL, "coca": COCA}


def make(tmp_path: Path, config: dict = TINY, **options) -> Clip:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config))
    return Clip(config=str(path), **options)


def loaded(tmp_path: Path, config: dict = TINY, **options) -> Clip:
    torch.manual_seed(0)
    backbone = make(tmp_path, config, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone.load()
    _scramble(backbone.network)
    return backbone


def _scramble(network: nn.Module) -> None:
    """Give every tensor an influence (open_clip starts biases at 0 and leaves some tensors uninitialised)."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        with torch.no_grad():
            base = torch.ones_like(parameter) if parameter.ndim == 1 else 0
            parameter.copy_(base + 0.1 * torch.randn(parameter.shape, generator=generator))


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def original(backbone: Clip, config: dict) -> nn.Module:
    """open_clip's own network, of its own classes, with the same values."""
    config = copy.deepcopy(config)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    network = (open_clip.CoCa if "multimodal_cfg" in config else kind)(**config)
    network.load_state_dict(backbone.network.state_dict())
    return network.eval()
