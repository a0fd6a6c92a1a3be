"""Read a LoRA, DoRA, LoHa or LoKr folder of Hugging Face PEFT, trained on a timm or transformers model, onto a network of this project.

PEFT is not imported; nothing but safetensors and JSON is read. Each layer's scale (alpha / r or alpha / sqrt(r), with its patterns) is
folded into its factors, so that the adapters here have scale 1.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.engine.adapter import Evidence, Method, find_method
from vision_peft.engine.adapter_set import AdapterSet
from vision_peft.engine.install import attach
from vision_peft.engine.site import Site, whole_sites
from vision_peft.engine.store import CONFIG, read_tensors
from vision_peft.errors import UserError, nearest

Layers = Mapping[Site, tuple[str, dict[str, Tensor]]]  # PEFT's path and tensors of the layer that a site is
States = dict[Site, dict[str, Tensor]]  # state_dicts of our adapters

PREFIX = "base_model.model."
# PEFT's names of the tensors of one layer, by the end of their keys
LAYER = re.compile(r"(.+)\.(lora_[AB]|lora_magnitude_vector|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.weight)?$")

# transformers' layer names (of version 4, and the shorter ones of version 5) -> canonical names of this project; timm's are paths here
_BLOCK = r"(?:.+\.)?(?:encoder\.)?layers?\.(\d+)\."
_CLIP = r"(?:.+\.)?{}_model\.encoder\.layers\.(\d+)\."
TRANSFORMERS = [
    *((_CLIP.format(tower) + r"self_attn\.([qkv])_proj", rf"{tower}.\1.attn.\2") for tower in ("vision", "text")),
    *((_CLIP.format(tower) + r"self_attn\.out_proj", rf"{tower}.\1.attn.out") for tower in ("vision", "text")),
    *((_CLIP.format(tower) + r"mlp\.(fc[12])", rf"{tower}.\1.mlp.\2") for tower in ("vision", "text")),
    (rf"{_BLOCK}attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)", r"vision.\1.attn.\2"),
    (rf"{_BLOCK}attention\.(?:output\.dense|o_proj)", r"vision.\1.attn.out"),
    (rf"{_BLOCK}intermediate\.dense", r"vision.\1.mlp.fc1"),
    (rf"{_BLOCK}output\.dense", r"vision.\1.mlp.fc2"),
    (rf"{_BLOCK}mlp\.(fc[12])", r"vision.\1.mlp.\2"),
    (r"(?:.+\.)?patch_embeddings\.projection", r"vision.patch_embed"),
]


@torch.no_grad()
def load_peft(network: nn.Module, folder: str | os.PathLike[str], sites: Sequence[Site], name: str = "default") -> AdapterSet:
    """Attach the adapters of a PEFT folder to `network`; dropout is left out, as the folder is for inference.

    A fused projection that PEFT adapted as one matrix is adapted as one here (`vision.3.attn.qkv`). Trained heads in the folder
    (modules_to_save) belong to another task's code and are left out.

    Raises:
        UserError: one line naming the folder and what does not fit; the network is then as it was.
    """
    config, layers = _read(Path(folder))
    return attach_layers(network, config, layers, sites, name, folder)


@torch.no_grad()
def attach_layers(
    network: nn.Module, config: Mapping[str, Any], layers: Mapping[str, dict[str, Tensor]], sites: Sequence[Site], name: str, folder: object
) -> AdapterSet:
    """Attach layers as PEFT's config describes them.

    Args:
        layers: tensors by PEFT's short names, by the path of a module.
        folder: where they are from, for messages.
    """
    kind = str(config.get("peft_type", "")).upper()
    if kind not in _READERS:
        raise UserError(f"{folder}/{CONFIG}: peft_type {kind or None} is not one of {', '.join(_READERS)}")
    _check_alphas(config, folder)
    placed = {path: _site(path, network, sites, folder) for path in layers}
    chosen = [site for site in [*sites, *whole_sites(sites)] if site in placed.values()]
    shown = {placed[path]: (path, tensors) for path, tensors in layers.items()}
    if len(shown) < len(layers):
        raise UserError(f"{folder}: two of its layers are the same layer of this backbone")
    method, states = _READERS[kind](config, {site: shown[site] for site in chosen}, folder)
    for site in chosen:  # all is checked before anything is attached
        own = method.adapter(site, None)
        own.initialize(site.matrix(network.get_parameter(site.path).detach()).float().cpu(), Evidence(torch.Generator()))
        _check(own.state_dict(), states[site], shown[site][0], folder)
    adapters = attach(network, method, [site.name for site in chosen], sites=sites, name=name)
    for site, adapter in zip(adapters.sites, adapters.adapters.values()):
        adapter.load_state_dict(states[site])
    return adapters


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """adapter_config.json, and the tensors of every layer by PEFT's short names (lora_A, hada_w1_a, ...)."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG} in this folder: not a PEFT folder")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(f"{folder / CONFIG}: key 'peft_type' is missing: not a PEFT folder")
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder / CONFIG}: bias is {config['bias']!r}: trained biases cannot be imported")
    saved = tuple(config.get("modules_to_save") or ())
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(folder).items():
        match = LAYER.fullmatch(key.removeprefix(PREFIX))
        if match:
            layers.setdefault(match[1].replace(".base_layer", ""), {})[match[2]] = tensor.float()
        elif not any(f".{module}." in f".{key}" for module in saved):
            raise UserError(f"{folder}: tensor {key!r} belongs to no LoRA, DoRA, LoHa or LoKr layer")
    if not layers:
        raise UserError(f"{folder}: holds no adapter layer")
    return config, layers


def _site(path: str, network: nn.Module, sites: Sequence[Site], folder: object) -> Site:
    """The site that PEFT's layer at `path` is on this network."""
    here = [site for site in [*whole_sites(sites), *sites] if site.path == f"{path}.weight"]
    name = next((re.sub(pattern, target, path) for pattern, target in TRANSFORMERS if re.fullmatch(pattern, path)), None)
    here += [site for site in sites if site.name == name]
    if not here:
        raise UserError(f"{folder}: this backbone has no layer {path!r}{nearest(path, [site.path for site in sites])}")
    return here[0]


def _check_alphas(config: Mapping[str, Any], folder: object) -> None:
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise UserError(f"{folder}: has an alpha that is no number: alpha_pattern is {pattern!r}")
    told = {key: config[key] for key in ("lora_alpha", "alpha") if config.get(key) is not None}
    for key, value in {**told, **pattern}.items():
        if not isinstance(value, (int, float)):
            raise UserError(f"{folder}: has an alpha that is no number: {key}: {value!r}")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise UserError(f"{folder}: alpha_pattern: {key!r} is no regular expression ({error})") from error


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """alpha / r or alpha / sqrt(r) of the layer, by the first of PEFT's patterns (regular expressions) that matches the end of its name."""
    alpha = config.get("lora_alpha", config.get("alpha", rank))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _lora(config: Mapping[str, Any], layers: Layers, folder: object) -> tuple[Method, States]:
    """LoRA and DoRA. Layers of a smaller rank are padded with zeros."""
    dora = bool(config.get("use_dora"))
    wanted = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if dora else [])}
    _require(layers, wanted, folder)
    rank = max(len(tensors["lora_A"]) for _, tensors in layers.values())
    states = {}
    for site, (path, tensors) in layers.items():
        own = len(tensors["lora_A"])
        B = tensors["lora_B"].flatten(1) * _scale(config, path, own)
        states[site] = {"A": F.pad(tensors["lora_A"].flatten(1), (0, 0, 0, rank - own)), "B": F.pad(B, (0, rank - own))}
        if dora:
            states[site]["magnitude"] = tensors["lora_magnitude_vector"].flatten()
    return find_method("dora" if dora else "lora")(rank=rank, alpha=float(rank)), states


def _loha(config: Mapping[str, Any], layers: Layers, folder: object) -> tuple[Method, States]:
    _require(layers, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, folder)
    rank = max(len(tensors["hada_w1_b"]) for _, tensors in layers.values())
    states = {}
    for site, (path, tensors) in layers.items():
        more = rank - len(tensors["hada_w1_b"])
        scale = _scale(config, path, rank - more)
        states[site] = {
            "B1": F.pad(tensors["hada_w1_a"] * scale, (0, more)),
            "A1": F.pad(tensors["hada_w1_b"], (0, 0, 0, more)),
            "B2": F.pad(tensors["hada_w2_a"], (0, more)),
            "A2": F.pad(tensors["hada_w2_b"], (0, 0, 0, more)),
        }
    return find_method("loha")(rank=rank, alpha=float(rank)), states


def _lokr(config: Mapping[str, Any], layers: Layers, folder: object) -> tuple[Method, States]:
    """w1 and w2, dense or products; PEFT decides by the same rule as here, so equal settings give equal shapes."""
    factor = config.get("decompose_factor", -1)
    rank = int(config["r"])
    states = {}
    for site, (path, tensors) in layers.items():
        if "lokr_t2" in tensors:
            raise UserError(f"{folder}: {path} is in Tucker form, which is not known here")
        wanted = {key for number in ("w1", "w2") for key in _factor_keys(number, tensors)}
        _require({site: (path, tensors)}, wanted, folder)
        state: dict[str, Tensor] = {}
        for number in ("w1", "w2"):
            *left, right = (tensors[key].flatten(1) for key in _factor_keys(number, tensors))
            state |= {f"{number}.right": right, **({f"{number}.left": left[0]} if left else {})}
        first = "w1.left" if "w1.left" in state else "w1.right"
        state[first] = state[first] * _scale(config, path, rank)
        states[site] = state
    options = {"factor": None if factor in (-1, None) else factor, "decompose_both": bool(config.get("decompose_both"))}
    return find_method("lokr")(rank=rank, alpha=float(rank), **options), states


def _factor_keys(number: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """PEFT's names of a factor of LoKr: one dense matrix, or the two of a product."""
    return [f"lokr_{number}"] if f"lokr_{number}" in tensors else [f"lokr_{number}_a", f"lokr_{number}_b"]


_READERS = {"LORA": _lora, "LOHA": _loha, "LOKR": _lokr}


def _require(layers: Layers, wanted: set[str], folder: object) -> None:
    for path, tensors in layers.values():
        missing, extra = wanted - tensors.keys(), tensors.keys() - wanted
        if missing or extra:
            what = f"{sorted(missing)[0]} is missing" if missing else f"{sorted(extra)[0]} is not known here"
            raise UserError(f"{folder}: {path}: {what}")


def _check(own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: str, folder: object) -> None:
    for key in sorted(own.keys() | given.keys()):
        theirs = tuple(given[key].shape) if key in given else None
        ours = tuple(own[key].shape) if key in own else None
        if theirs != ours:
            raise UserError(f"{folder}: {path}: {key} has shape {theirs}, this backbone's layer needs {ours}")
