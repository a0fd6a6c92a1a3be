"""Read a LoRA file of diffusers or of kohya's scripts onto a denoiser. Nothing but safetensors is read.

    diffusers   unet.<path>.lora_A.weight, .lora_B.weight; the older <path>.lora.down.weight, .lora.up.weight and
                <path>.processor.to_q_lora.down.weight; with or without `unet.` / `transformer.`; alpha in the header or as <path>.alpha
    kohya       lora_unet_<path with _ for .>.lora_down.weight, .lora_up.weight, .alpha; the path in diffusers' names, or, as files for
                Stable Diffusion XL have it, in those of the model's authors

A layer's scale is alpha / rank, 1 where no alpha is told.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vision_peft.engine.adapter_set import AdapterSet
from vision_peft.engine.authors_unet_names import in_diffusers_names
from vision_peft.engine.peft_import import attach_layers
from vision_peft.engine.peft_layout import _CONV
from vision_peft.engine.site import Site
from vision_peft.errors import UserError, nearest

METADATA = "lora_adapter_metadata"  # of diffusers, in the header
TEXT = ("text_encoder.", "text_encoder_2.", "text_encoder_3.", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
_PARTS = {"lora_A": "lora_A", "lora.down": "lora_A", "lora_down": "lora_A", "lora_B": "lora_B", "lora.up": "lora_B", "lora_up": "lora_B"}
_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora\.down|lora\.up|lora_down|lora_up)(?:\.default)?\.weight")
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")


@torch.no_grad()
def load_diffusers(network: nn.Module, file: str | os.PathLike[str], sites: Sequence[Site], name: str = "default") -> AdapterSet:
    """Attach the LoRA of a file (or of the only safetensors file of a folder) to `network`; parts of text encoders are passed over, told.

    Raises:
        UserError: one line naming the file and what does not fit; the network is then as it was.
    """
    path = _file(Path(file))
    tensors, header = _read(path)
    told = [key for key in tensors if key.startswith(TEXT)]
    if told:
        warnings.warn(f"{path}: {len(told)} tensors of text encoders ({told[0]}, ...) are passed over", stacklevel=2)
    known = {each: module for each, module in network.named_modules() if isinstance(module, (nn.Linear, *_CONV))}
    depth = getattr(getattr(network, "config", None), "layers_per_block", None)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(TEXT):
            continue
        spelled, part = _parsed(key, path)
        layer = layers.setdefault(_module(spelled, known, depth, path), {})
        if part in layer:  # the same layer as unet.<path> and <path>, or as kohya spells it: which of them is meant cannot be told
            raise UserError(f"{path}: {key!r} is the second {part} of its layer")
        layer[part] = tensor.float()
    if not layers:
        raise UserError(f"{path}: holds no LoRA of a denoiser")
    config = _alphas(header, path)
    if config and any("alpha" in parts for parts in layers.values()):
        raise UserError(f"{path}: tells alpha twice, in its header and as tensors")
    widest = max((len(parts["lora_A"]) for parts in layers.values() if parts.get("lora_A", torch.empty(())).ndim), default=0)
    for layer, parts in layers.items():
        _check(layer, parts, known[layer], widest, path)
        alpha = parts.pop("alpha", None)
        if alpha is not None:
            if alpha.numel() != 1 or not math.isfinite(alpha):
                raise UserError(f"{path}: {layer}: alpha is not one finite number")
            parts["lora_B"] = parts["lora_B"] * (float(alpha) / len(parts["lora_A"]))
    return attach_layers(network, {"peft_type": "LORA", **config}, layers, sites, name, path)


def _file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path}: does not exist")
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(f"{path}: holds {len(found)} .safetensors files; name the one to read")
    return found[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}, stream.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or a damaged one ({error})") from error


def _parsed(key: str, path: Path) -> tuple[str, str]:
    """The layer, as the file spells it, and lora_A, lora_B or alpha."""
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    if match := _PROCESSOR.fullmatch(key):
        inner = "to_out.0" if match[2] == "to_out" else match[2]
        return f"{match[1]}.{inner}", "lora_A" if match[3] == "down" else "lora_B"
    if match := _KEY.fullmatch(key):
        return match[1], _PARTS[match[2]]
    raise UserError(f"{path}: tensor {key!r} is none of a LoRA in diffusers' or kohya's layout")


def _module(layer: str, known: Mapping[str, nn.Module], depth: Any, path: Path) -> str:
    """The path of the module that a file's layer is; `depth`: layers_per_block of a UNet."""
    for prefix in ("unet.", "transformer.", ""):
        if layer.startswith(prefix) and layer.removeprefix(prefix) in known:
            return layer.removeprefix(prefix)
    for prefix in ("lora_unet_", "lora_transformer_"):
        flat = layer.removeprefix(prefix)
        if flat != layer:
            flat = in_diffusers_names(flat, depth) if isinstance(depth, int) else flat
            found = [each for each in known if each.replace(".", "_") == flat]
            if len(found) == 1:
                return found[0]
            if found:
                raise UserError(f"{path}: {layer} may be {' or '.join(found)}")
    plain = layer.removeprefix("lora_unet_").removeprefix("unet.").removeprefix("transformer.")
    raise UserError(f"{path}: this denoiser has no layer {layer!r}: a LoRA of another architecture?{nearest(plain, list(known))}")


def _check(layer: str, pair: Mapping[str, Tensor], module: nn.Module, widest: int, path: Path) -> None:
    for part in ("lora_A", "lora_B"):
        if part not in pair:
            raise UserError(f"{path}: {layer}: {part} (its {'down' if part == 'lora_A' else 'up'} matrix) is missing")
    A, B, shape = pair["lora_A"].shape, pair["lora_B"].shape, module.weight.shape
    rank = B[1] if len(B) > 1 else 0
    if not rank or _plain(A) != _plain((rank, *shape[1:])) or _plain(B) != (shape[0], rank):
        given = f"matrices {tuple(A)} and {tuple(B)}"
        raise UserError(f"{path}: {layer}: {given} do not fit its weight {tuple(shape)}: a LoRA of another architecture?")
    if widest > (most := min(shape[0], math.prod(shape[1:]))):  # one method has one rank: smaller ones are padded
        raise UserError(f"{path}: {layer}: its weight {tuple(shape)} has rank {most} at most, and the file's largest rank is {widest}")


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """Without the 1 x 1 of a kernel, which is a matrix: files and denoisers have proj_in as either."""
    return tuple(shape[:2]) if set(shape[2:]) <= {1} else tuple(shape)


def _alphas(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Scales that diffusers writes into the header, with or without the denoiser's prefix."""
    if METADATA not in header:
        return {}
    try:
        found = json.loads(header[METADATA])
    except ValueError as error:
        raise UserError(f"{path}: its header's {METADATA} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: its header's {METADATA} is no mapping")
    plain = {key.removeprefix("unet.").removeprefix("transformer."): value for key, value in found.items()}
    if plain.get("use_dora"):
        raise UserError(f"{path}: is a DoRA, which is not known here in diffusers' layout")
    return {key: plain[key] for key in ("lora_alpha", "alpha_pattern", "use_rslora") if plain.get(key) is not None}
