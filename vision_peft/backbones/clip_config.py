"""What a CLIP's name stands for: model config, preprocessing, a file of weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained_from_hf

from vision_peft.backbones.clip_network import one_line
from vision_peft.errors import UserError, nearest

HUB = "hf-hub:"  # open_clip's prefix of a Hugging Face repository that holds both config and weights
LOCAL = "local-dir:"  # and of a folder with the same files
CONFIG_FILE, WEIGHTS_FILES = "open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def brings_weights(name: str) -> bool:
    """Whether the name alone says where the weights are."""
    return name.startswith((HUB, LOCAL))


def read_config(name: str, path: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model config of `name`, or of the file `path` in its stead, and the preprocessing config where the source has one."""
    if path is None and not brings_weights(name):
        config = open_clip.get_model_config(name)
        if config is None:
            raise UserError(f"backbone.name: open_clip has no model {name!r}{nearest(name, open_clip.list_models())}")
        return config, {}
    try:
        path = path or _config_file(name)
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        config = content.get("model_cfg", content)
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - config.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"model config {path or name}: {one_line(error)}") from error
    if missing:
        raise UserError(f"model config {path}: no {', '.join(sorted(missing))}")
    if name.startswith(LOCAL):
        _use_words_of(Path(name.removeprefix(LOCAL)), config["text_cfg"])
    return config, content.get("preprocess_cfg", {})


def _config_file(name: str) -> str:
    if name.startswith(LOCAL):
        return str(Path(name.removeprefix(LOCAL)) / CONFIG_FILE)
    return download_pretrained_from_hf(name.removeprefix(HUB), filename=CONFIG_FILE)


def _use_words_of(folder: Path, text: dict[str, Any]) -> None:
    """A Hugging Face text tower's shape and tokenizer come from the folder itself where they lie in it."""
    if "hf_model_name" in text and (folder / "config.json").is_file():
        text["hf_model_name"] = str(folder)
    if "hf_tokenizer_name" in text and (folder / "tokenizer_config.json").is_file():
        text["hf_tokenizer_name"] = str(folder)


def weights_file(name: str, weights: str | None, tag: dict[str, Any]) -> str | None:
    """The file to read, downloaded into open_clip's cache where it is a tag's or a hub repository's; None: random values.

    Args:
        weights: as the user gave it.
        tag: open_clip's entry of a pretrained tag, empty where `weights` is none.
    """
    if weights is None and name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        for file in WEIGHTS_FILES:
            if (folder / file).is_file():
                return str(folder / file)
        raise UserError(f"backbone.name: {folder} holds no {' or '.join(WEIGHTS_FILES)}")
    try:
        if tag:
            return open_clip.download_pretrained(tag)
        if weights is None and name.startswith(HUB):
            return download_pretrained_from_hf(name.removeprefix(HUB))
    except Exception as error:  # urllib, huggingface_hub and open_clip each raise their own
        what = f"{name} {weights}" if tag else name
        raise UserError(f"backbone.weights: {what} could not be downloaded: {one_line(error)}") from error
    return weights


def check_weights(name: str, weights: str | None, tag: dict[str, Any]) -> None:
    if weights is None or tag or os.path.isfile(weights):
        return
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = f" (tags: {', '.join(tags)})" if tags else ""
    raise UserError(f"backbone.weights: {weights!r} is neither a file nor a pretrained tag of {name}{nearest(weights, tags)}{known}")


def check_image_size(name: str, vision: dict[str, Any], size: int, weights: str | None) -> None:
    if vision.get("timm_model_name"):
        return
    native, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
    if isinstance(vision.get("layers"), list):
        if weights is not None and size != native:
            raise UserError(f"backbone.image_size: open_clip cannot resize the attention pool of {name}, trained at {native}; got {size}")
    elif size < patch or size % patch:
        below = max(size // patch * patch, patch)
        raise UserError(f"backbone.image_size: {size} is not a multiple of {name}'s patch size {patch}; try {below} or {below + patch}")
