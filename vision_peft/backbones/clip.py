"""CLIP and its relatives by open_clip: image and text features in one space, every parameter under a canonical name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vision_peft.backbones.base import Preprocess
from vision_peft.backbones.clip_config import brings_weights, check_image_size, check_weights, read_config, weights_file
from vision_peft.backbones.clip_network import CutVisionTransformer, build, is_torchscript, load_weights, one_line, resize, side_of
from vision_peft.backbones.clip_sites import AFTER_BLOCKS, POSITIONS, name_clip_sites
from vision_peft.backbones.clip_text import SHORT, tokenizer
from vision_peft.backbones.two_towers import TwoTowers
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class Clip(TwoTowers):
    """An open_clip model, both towers.

    Args:
        name: open_clip model name (`ViT-B-16`, `RN50`, `ViT-B-16-SigLIP`, ...), or `hf-hub:<owner>/<repository>` or `local-dir:<folder>`,
            which bring their weights.
        weights: an open_clip pretrained tag of that model (`openai`, `laion2b_s34b_b88k`, ...), a file (.safetensors, .pt, OpenAI's
            archive), or None: random values, with a warning.
        config: an open_clip model config (JSON) to use instead of a built-in one; its file name becomes the model's name.
        image_size: side of the image; position tables are resized to it. None: the model's own.
        quick_gelu: activation of the towers. `auto` is what the pretrained tag was trained with (open_clip itself would run
            `ViT-B-16` with OpenAI's weights on plain GELU and lose several points), and True for a TorchScript archive, which is
            OpenAI's own layout; another file does not say, so there `auto` follows the model config.
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
        self.name = Path(config).stem if config else name if brings_weights(name) else name.replace("/", "-")
        self.weights, self.config = weights, config

        self._config, transform = read_config(self.name, config)
        self._tag = open_clip.get_pretrained_cfg(self.name, weights) if weights else {}
        check_weights(self.name, weights, self._tag)
        openai = bool(weights) and not self._tag and is_torchscript(weights)
        trained = openai or self._tag.get("quick_gelu", self._config.get("quick_gelu", False))
        self._config["quick_gelu"] = trained if quick_gelu == "auto" else quick_gelu
        self._resize_to = image_size
        if image_size is not None:
            check_image_size(self.name, self._config["vision_cfg"], image_size, weights)
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
        source = weights_file(self.name, self.weights, self._tag)
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
        return tokens[:, : tower.needed(tokens)] if isinstance(tower, SHORT) else tokens

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
