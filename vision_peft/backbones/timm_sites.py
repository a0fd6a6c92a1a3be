"""Canonical names and true readers of the parameters of a timm network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from timm.layers import AttentionPoolLatent, AttentionRope
from timm.models import beit, eva, swin_transformer, swin_transformer_v2, vision_transformer
from torch import nn

from vision_peft.engine.site import Site, enumerate_sites, renamer

# Attention classes whose `qkv` stacks the rows of q, k and v in three equal blocks. Others interleave heads or give the
# parts different widths, so the projection of a class not listed stays one site.
STACKED_QKV = (
    vision_transformer.Attention,
    AttentionRope,
    eva.EvaAttention,
    beit.Attention,
    swin_transformer.WindowAttention,
    swin_transformer_v2.WindowAttention,
)

COMMON = [(r"", "vision"), (r"patch_embed\.proj", "vision.patch_embed")]

# A plain stack of attention blocks: `blocks.3.mlp.fc1` is `vision.3.mlp.fc1`.
STACK = renamer(
    [
        *COMMON,
        (r"blocks\.(\d+)\.attn\.proj", r"vision.\1.attn.out"),
        (r"blocks\.(\d+)\.attn\.([qkv])_proj", r"vision.\1.attn.\2"),
        (r"blocks\.(\d+(?:\..+)?)", r"vision.\1"),
        (r"(.+)", r"vision.\1"),
    ]
)

# Everything else keeps timm's own path: `vision.blocks.2.1.conv_dw`, `vision.layers.0.blocks.1.attn.out`.
STAGED = renamer([*COMMON, (r"(.+\.attn)\.proj", r"vision.\1.out"), (r"(.+)", r"vision.\1")])


def is_stack(network: nn.Module) -> bool:
    """Whether `network.blocks` is a plain sequence of attention blocks, as in a vision transformer."""
    blocks = getattr(network, "blocks", None)
    return isinstance(blocks, (nn.Sequential, nn.ModuleList)) and all(hasattr(block, "attn") for block in blocks)


def trace(network: nn.Module, image_size: int) -> tuple[set[str], tuple[int, ...]]:
    """Run a network of the meta device once, without values, on an image (1, 3, image_size, image_size).

    Returns:
        The paths of the modules that were called, and the shape of the output.
    """
    called: set[str] = set()
    hooks = [module.register_forward_pre_hook(lambda module, args, path=path: called.add(path)) for path, module in network.named_modules()]
    training = network.training
    try:
        with torch.no_grad():
            features = network.eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return called, tuple(features.shape)


def name_sites(network: nn.Module, called: set[str], root_calls: tuple[str, ...]) -> list[Site]:
    """Every parameter of the network as sites named `vision.…`, each with the module whose call reads it.

    timm's BEiT, EVA and Swin V2 never call their `qkv` layer: the attention reads its weight for F.linear. A replacement
    of the layer's forward would silently do nothing there, so the reader of a parameter is the nearest module above it
    that is really called (`called`, from `trace`).
    """
    modules = dict(network.named_modules())
    rename = STACK if is_stack(network) else STAGED

    def fused(path: str, module: nn.Module) -> Sequence[str] | None:
        parent, _, child = path.rpartition(".")
        layer, attention = rename(parent), modules.get(parent)
        if child == "qkv" and isinstance(attention, STACKED_QKV):
            return [f"{layer}.{part}" for part in "qkv"]
        if child == "kv" and isinstance(attention, AttentionPoolLatent):
            return [f"{layer}.{part}" for part in "kv"]
        return None

    return [_read_by(site, called) for site in enumerate_sites(network, rename, fused, {"": root_calls})]


def _read_by(site: Site, called: set[str]) -> Site:
    """The site with its reader moved up to the nearest module in `called`; the parameter's path is lengthened to match."""
    reader, parameter = site.reader, site.parameter
    while reader and reader not in called:
        reader, _, child = reader.rpartition(".")
        parameter = f"{child}.{parameter}"
    return site if reader == site.reader else replace(site, reader=reader, parameter=parameter)
