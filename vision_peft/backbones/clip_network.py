"""open_clip's networks with what they lack here (a tower in two parts, short prompts), built and loaded without its global state."""

from __future__ import annotations

import warnings
import zipfile
from copy import deepcopy
from typing import Any, ClassVar

import open_clip
import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_peft.backbones.clip_text import ShortHFText, ShortTextCLIP, ShortTextTransformer
from vision_peft.backbones.timm_attention import choose_attention
from vision_peft.engine.attention import BatchedAttention
from vision_peft.errors import UserError


class CutVisionTransformer(VisionTransformer):
    """The vision tower in two parts, as methods of the module that owns the class token, the position table and `proj`."""

    calls: ClassVar = ("forward", "forward_intermediates", "prefix", "suffix")  # the methods that read the tensors it owns itself

    def prefix(self, images: Tensor, block: int) -> Tensor:
        return self._run(self._embeds(images), 0, block)

    def suffix(self, hidden: Tensor, block: int) -> Tensor:
        pooled, _ = self._pool(self._run(hidden, block, self.transformer.layers))
        return pooled @ self.proj

    def _run(self, x: Tensor, start: int, stop: int) -> Tensor:
        for block in list(self.transformer.resblocks)[start:stop]:
            x = checkpoint(block, x, use_reentrant=False) if self.transformer.grad_checkpointing else block(x)
        return x


class ScaledCustomTextCLIP(CustomTextCLIP):
    calls: ClassVar = ("forward", "get_logits", "forward_intermediates", "learned_scale")

    def learned_scale(self) -> Tensor:
        return self.logit_scale.exp()


class ScaledCoCa(CoCa):
    calls: ClassVar = ("forward", "forward_intermediates", "learned_scale")

    def learned_scale(self) -> Tensor:
        return self.logit_scale.exp()


OPENAI_FACTS = ("input_resolution", "context_length", "vocab_size")  # numbers among the tensors of OpenAI's archives

EXTENDED: dict[type[nn.Module], type[nn.Module]] = {
    CLIP: ShortTextCLIP,
    CustomTextCLIP: ScaledCustomTextCLIP,
    CoCa: ScaledCoCa,
    HFTextEncoder: ShortHFText,
    TextTransformer: ShortTextTransformer,
    VisionTransformer: CutVisionTransformer,
    nn.MultiheadAttention: BatchedAttention,
}


def build(config: dict[str, Any]) -> nn.Module:
    """The network of an open_clip model config with random values, on the current default device.

    As open_clip.create_model, which would also log through (and so configure) the root logger and could take own configs only
    by way of its process-wide registry. What regularises training from scratch is off: a frozen tower always sees the same.
    """
    config = deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    custom = config.pop("custom_text", False) or bool(text.get("hf_model_name"))
    kind = CLIP if not custom else CoCa if "multimodal_cfg" in config else CustomTextCLIP
    vision |= {"timm_model_pretrained": False, "timm_drop": 0.0, "timm_drop_path": None, "patch_dropout": 0.0}
    text |= {"hf_model_pretrained": False}
    network = kind(**config)
    for module in network.modules():
        module.__class__ = EXTENDED.get(type(module), type(module))
        if isinstance(module, nn.Dropout):  # of Hugging Face's text towers
            module.p = 0.0
        if isinstance(module, ShortHFText):  # prompts are short: matrix products take half the time of torch's attention kernel
            module.transformer.set_attn_implementation("eager")
    if isinstance(network.visual, TimmModel):
        choose_attention(network.visual.trunk)
    return network.requires_grad_(False)


def load_weights(network: nn.Module, source: str, name: str) -> None:
    try:
        if is_torchscript(source):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch advises those who write such archives to stop
                state = torch.jit.load(source, map_location="cpu").state_dict()
            state = {key: value.float() for key, value in state.items() if key not in OPENAI_FACTS}
            open_clip.model.resize_pos_embed(state, network)
            network.load_state_dict(state)
        else:
            open_clip.load_checkpoint(network, source, strict=True, weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise their own for a damaged or foreign file
        raise UserError(f"{source} cannot be loaded as {name}: {one_line(error)}") from error


def is_torchscript(path: str) -> bool:
    """Whether a file is an archive of torch.jit, as OpenAI published its weights; its program is never run."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def resize(network: nn.Module, size: int | None) -> None:
    """timm towers are built, and loaded, at their own size first; open_clip's own resize the position table while loading."""
    if size is not None and isinstance(network.visual, TimmModel):
        network.visual.set_input_size(size)


def side_of(network: nn.Module) -> int:
    size = network.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if height != width:
        raise UserError(f"image size {height} x {width}: only square ones are supported")
    return height


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
