"""An image tower and a sentence encoder that travel in packages, written as one open_clip model: nothing of it is trained jointly yet.

The image tower is DINOv2 ViT-S/14 in open_clip's own VisionTransformer, computing what timm's network does. Two things move on the way:

    patch embedding     open_clip's convolution has no bias: it is added to the position table's rows of patches
    class position      timm adds nothing of its own to the class token either: table row 0 stays what it is

The text tower is all-MiniLM-L6-v2 behind open_clip's wrapper of Hugging Face models: the mean of the tokens' last hidden states, less
a fixed centre, which goes into the bias of the last LayerNorm (the mean of x + b is the mean of x, plus b).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vision_peft.backbones import minilm
from vision_peft.backbones.clip_network import build
from vision_peft.backbones.offline import fetch
from vision_peft.backbones.vit import Vit

IMAGES, SIZE = "offline:dinov2_vits14", 112
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"  # what open_clip itself would fetch for the text tower's shape and words
LAST_BIAS = "transformer.encoder.layer.5.output.LayerNorm.bias"
CONFIG: dict[str, Any] = {
    "embed_dim": minilm.WIDTH,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": 9,
        "width": 384,
        "head_width": 64,
        "patch_size": 14,
        "ls_init_value": 1e-5,
        "no_ln_pre": True,
        "pool_type": "avg",
        "norm_kwargs": {"eps": 1e-6},
    },
    "text_cfg": {
        "hf_model_name": HUB_NAME,
        "hf_tokenizer_name": HUB_NAME,
        "hf_proj_type": None,
        "hf_pooler_type": "mean_pooler",
        "context_length": minilm.LONGEST,
    },
    "custom_text": True,
}
PREPROCESS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic"}
WORDS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")  # beside the weights

_PARTS = {"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def network_from_parts() -> nn.Module:
    """The two towers in open_clip's network, frozen; `visual.proj` (384, 384) is the identity and the text is not centred."""
    vit = Vit(IMAGES, image_size=SIZE)
    vit.load()
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "hf_model_name": str(fetch(minilm.NAME))}}
    network = build(config)
    network.visual.load_state_dict(image_state(vit.network.state_dict()))
    network.text.load_state_dict(text_state(load_file(fetch(minilm.NAME) / "model.safetensors")))
    return network.eval()


def image_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of open_clip's VisionTransformer from timm's of a DINOv2 (plain blocks with LayerScale, no head)."""
    position = state["pos_embed"][0].clone()  # (1 + patches, width)
    position[1:] += state["patch_embed.proj.bias"]
    found = {
        "class_embedding": state["cls_token"][0, 0],
        "positional_embedding": position,
        "proj": torch.eye(position.shape[1], minilm.WIDTH),
        "conv1.weight": state["patch_embed.proj.weight"],
        "ln_post.weight": state["norm.weight"],
        "ln_post.bias": state["norm.bias"],
    }
    for key, value in state.items():
        if not key.startswith("blocks."):
            continue
        _, number, rest = key.split(".", 2)
        layer, _, leaf = rest.rpartition(".")
        if layer == "attn.qkv":
            name = f"attn.in_proj_{leaf}"
        elif layer in ("ls1", "ls2"):
            name = f"ls_{layer[-1]}.gamma"
        else:
            name = f"{_PARTS[layer]}.{leaf}"
        found[f"transformer.resblocks.{number}.{name}"] = value
    return found


def text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of open_clip's HFTextEncoder from Hugging Face's of the sentence encoder."""
    unused = ("pooler.", "embeddings.position_ids")
    return {f"transformer.{key}": value for key, value in state.items() if not key.startswith(unused)}


@torch.no_grad()
def centre_text(network: nn.Module, centre: Tensor) -> None:
    """Take `centre` (384,) off every text feature."""
    network.text.get_parameter(LAST_BIAS).sub_(centre)


def write_folder(network: nn.Module, folder: Path) -> None:
    """A folder that open_clip and Clip read as `local-dir:FOLDER`: config, weights, and the text tower's shape and words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}, indent=2))
    for name in WORDS:
        if (fetch(minilm.NAME) / name).is_file():
            shutil.copy(fetch(minilm.NAME) / name, folder / name)
    fresh = folder / ".open_clip_model.safetensors.partial"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, fresh)
    fresh.chmod(0o644)
    fresh.replace(folder / "open_clip_model.safetensors")  # last: a folder with weights is a whole one
