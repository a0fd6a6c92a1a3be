"""CLIP and its relatives by open_clip: image and text features in one space, every parameter under a canonical name."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vision_peft.backbones.base import Preprocess
from vision_peft.backbones.clip_network import CutVisionTransformer, build, load_weights, one_line, resize, side_of
from vision_peft.backbones.clip_sites import AFTER_BLOCKS, POSITIONS, name_clip_sites
from vision_peft.backbones.clip_text import ShortTextCLIP, ShortTextTransformer, tokenizer
from vision_peft.backbones.two_towers import TwoTowers
from vision_peft.engine.site import Site
from vision_peft.errors import UserError, nearest

HUB = "hf-hub:"  # open_clip's prefix of a Hugging Face repository that holds both config and weights


class Clip(TwoTowers):
    """An open_clip model, both towers.

    Args:
        name: open_clip model name (`ViT-B-16`, `RN50`, `ViT-B-16-SigLIP`, ...) or `hf-hub:<owner>/<repository>`, which brings its weights.
        weights: an open_clip pretrained tag of that model (`openai`, `laion2b_s34b_b88k`, ...), a file (.safetensors, .pt), or
            None: random values, with a warning.
        config: an open_clip model config (JSON) to use instead of a built-in one; its file name becomes the model's name.
        image_size: side of the image; position tables are resized to it. None: the model's own.
        quick_gelu: activation of the towers. `auto` is what the pretrained tag was trained with (open_clip itself would run
            `ViT-B-16` with OpenAI's weights on plain GELU and lose several points); a file does not say, so there `auto` follows
            the model config: set True for OpenAI's weights in a file.
        text_checkpointing, text_chunk: see TwoTowers.
    """

    def __init__(
        self,
        name: str = "ViT-B-16",
        *,
        weights: str | None = None,
        config: str | None = None,
        image_size: int | None = None,
        quick_gelu: bool | Literal["auto"] = "auto",
        text_checkpointing: bool = False,
        text_chunk: int | None = None,
    ) -> None:
        super().__init__(text_checkpointing, text_chunk)
        self.name = Path(config).stem if config else name.replace("/", "-") if not name.startswith(HUB) else name
        self.weights, self.config = weights, config

        self._config, transform = _read_config(self.name, config)
        self._tag = open_clip.get_pretrained_cfg(self.name, weights) if weights else {}
        _check_weights(self.name, weights, self._tag)
        trained = self._tag.get("quick_gelu", self._config.get("quick_gelu", False))
        self._config["quick_gelu"] = trained if quick_gelu == "auto" else quick_gelu
        self._resize_to = image_size
        if image_size is not None:
            _check_image_size(self.name, self._config["vision_cfg"], image_size, weights)
            self._config["vision_cfg"]["image_size"] = image_size

        self.network, self._sites = outline(self.name, self._config, image_size)
        self.num_features = self._config["embed_dim"]
        transform = merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), transform), self._tag)
        self.preprocess = Preprocess(side_of(self.network), tuple(transform["mean"]), tuple(transform["std"]), transform["interpolation"])
        self.resized = POSITIONS & self.network.state_dict().keys()
        self.train(self.training)

    def load(self) -> None:
        if not self.network.logit_scale.is_meta:
            return
        source = self._weights_source()
        if source is None:
            warnings.warn(f"Clip {self.name}: no weights given, the network starts from random values", stacklevel=2)
        network = build(self._config)
        if source is not None:
            load_weights(network, source, self.name)
        resize(network, self._resize_to)
        self.network = network.requires_grad_(False)
        self._remembered = None
        self.train(self.training)  # the new network takes over the mode of the outline

    def train(self, mode: bool = True) -> Clip:
        """Set the mode of everything but BatchNorm (ResNets), which stays in eval mode so that the frozen network does not drift."""
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def _weights_source(self) -> str | None:
        """The file to read, downloaded into open_clip's cache where it is a tag's or a hub repository's."""
        try:
            if self._tag:
                return open_clip.download_pretrained(self._tag)
            if self.weights is None and self.name.startswith(HUB):
                return download_pretrained_from_hf(self.name.removeprefix(HUB))
        except Exception as error:  # urllib, huggingface_hub and open_clip each raise their own
            what = f"{self.name} {self.weights}" if self._tag else self.name
            raise UserError(f"backbone.weights: {what} could not be downloaded: {one_line(error)}") from error
        return self.weights

    # ---- images ----

    @property
    def num_blocks(self) -> int:
        visual = self.network.visual
        return len(visual.transformer.resblocks) if isinstance(visual, CutVisionTransformer) else 0

    def first_block(self, targets: set[str]) -> int:
        return min((self._block(target) for target in targets), default=self.num_blocks)

    def _block(self, target: str) -> int:
        tower, _, rest = target.partition(".")
        part = rest.split(".")[0]
        if tower != "vision" or part in AFTER_BLOCKS:
            return self.num_blocks
        return min(int(part), self.num_blocks) if part.isdigit() else 0

    def prefix(self, images: Tensor, block: int) -> Tensor:
        return self.network.visual.prefix(images, block) if self.num_blocks else super().prefix(images, block)

    def suffix(self, hidden: Tensor, block: int) -> Tensor:
        return self.network.visual.suffix(hidden, block) if self.num_blocks else super().suffix(hidden, block)

    # ---- text ----

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (C, L), where L is the longest prompt's length if that gives the same features, else the full context."""
        try:
            encode = tokenizer(self._config["text_cfg"])
        except OSError as error:
            raise UserError(f"tokenizer {self._config['text_cfg']['hf_tokenizer_name']} of {self.name}: {one_line(error)}") from error
        tokens = encode(list(prompts))
        tower = getattr(self.network, "text", self.network)
        return tokens[:, : tower.needed(tokens)] if isinstance(tower, (ShortTextCLIP, ShortTextTransformer)) else tokens

    # ---- names ----

    def sites(self) -> list[Site]:
        return list(self._sites)

    def describe(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "name": self.name,
            "weights": self.weights,
            "config": self.config,
            "image_size": self.preprocess.size,
            "quick_gelu": self._config["quick_gelu"],
        }


def outline(name: str, config: dict[str, Any], image_size: int | None) -> tuple[nn.Module, list[Site]]:
    """The network on the meta device and the sites in it."""
    try:
        with torch.device("meta"):
            network = build(config)
            resize(network, image_size)
            return network, name_clip_sites(network, side_of(network))
    except UserError:
        raise
    except Exception as error:  # a misspelt key, an impossible size, a Hugging Face text tower whose config is not in the cache
        size = "" if image_size is None else f" with image_size {image_size}"
        raise UserError(f"backbone {name} cannot be built{size}: {one_line(error)}") from error


def _read_config(name: str, path: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model config, and preprocessing config where the source has one."""
    if path is None and not name.startswith(HUB):
        config = open_clip.get_model_config(name)
        if config is None:
            raise UserError(f"backbone.name: open_clip has no model {name!r}{nearest(name, open_clip.list_models())}")
        return config, {}
    try:
        path = path or download_pretrained_from_hf(name.removeprefix(HUB), filename="open_clip_config.json")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        config = content.get("model_cfg", content)
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - config.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"model config {path or name}: {one_line(error)}") from error
    if missing:
        raise UserError(f"model config {path}: no {', '.join(sorted(missing))}")
    return config, content.get("preprocess_cfg", {})


def _check_weights(name: str, weights: str | None, tag: dict[str, Any]) -> None:
    if weights is None or tag or os.path.isfile(weights):
        return
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = f" (tags: {', '.join(tags)})" if tags else ""
    raise UserError(f"backbone.weights: {weights!r} is neither a file nor a pretrained tag of {name}{nearest(weights, tags)}{known}")


def _check_image_size(name: str, vision: dict[str, Any], size: int, weights: str | None) -> None:
    if vision.get("timm_model_name"):
        return
    native, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
    if isinstance(vision.get("layers"), list):
        if weights is not None and size != native:
            raise UserError(f"backbone.image_size: open_clip cannot resize the attention pool of {name}, trained at {native}; got {size}")
    elif size < patch or size % patch:
        below = max(size // patch * patch, patch)
        raise UserError(f"backbone.image_size: {size} is not a multiple of {name}'s patch size {patch}; try {below} or {below + patch}")
