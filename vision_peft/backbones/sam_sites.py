"""Canonical names of SAM's layers: `vision.3.attn.q`, `vision.neck.0` is `neck.0`, `decoder.0.self_attn.q`, `prompt.point.1`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from segment_anything.modeling.image_encoder import Attention
from torch import nn

from vision_peft.engine.site import Site, enumerate_sites, renamer

RENAME = renamer(
    [
        (r"image_encoder", "vision"),
        (r"image_encoder\.patch_embed\.proj", "vision.patch_embed"),
        (r"image_encoder\.blocks\.(\d+)\.attn\.proj", r"vision.\1.attn.out"),
        (r"image_encoder\.blocks\.(\d+)\.mlp\.lin([12])", r"vision.\1.mlp.fc\2"),
        (r"image_encoder\.blocks\.(\d+(?:\..+)?)", r"vision.\1"),
        (r"image_encoder\.neck\.(\d)", r"neck.\1"),
        (r"prompt_encoder\.point_embeddings\.(\d)", r"prompt.point.\1"),
        (r"prompt_encoder\.not_a_point_embed", "prompt.padding"),
        (r"prompt_encoder\.no_mask_embed", "prompt.no_mask"),
        (r"prompt_encoder\.mask_downscaling\.(\d)", r"prompt.mask.\1"),
        (r"mask_decoder\.transformer\.layers\.(\d)\.cross_attn_(.+)\.(q|k|v|out)_proj", r"decoder.\1.\2.\3"),
        (r"mask_decoder\.transformer\.layers\.(\d)\.(.+)\.(q|k|v|out)_proj", r"decoder.\1.\2.\3"),
        (r"mask_decoder\.transformer\.layers\.(\d.+)", r"decoder.\1"),
        (r"mask_decoder\.transformer\.final_attn_token_to_image\.(q|k|v|out)_proj", r"decoder.final.\1"),
        (r"mask_decoder\.transformer\.norm_final_attn", "decoder.norm_final"),
        (r"mask_decoder\.output_upscaling\.(\d)", r"decoder.upscaling.\1"),
        (r"mask_decoder\.output_hypernetworks_mlps\.(\d+)\.layers\.(\d)", r"decoder.hypernetwork.\1.\2"),
        (r"mask_decoder\.iou_prediction_head\.layers\.(\d)", r"decoder.iou.\1"),
        (r"mask_decoder\.(.+)", r"decoder.\1"),
    ]
)

# Modules whose embedding tables are read by the module above them, which never calls the tables, and the method that reads them.
READ_BY_PARENT = {
    "prompt_encoder": ("forward", ("point_embeddings", "not_a_point_embed", "no_mask_embed")),
    "mask_decoder": ("predict_masks", ("iou_token", "mask_tokens")),
}


def name_sam_sites(network: nn.Module, trunk: Sequence[Site] | None) -> list[Site]:
    """Every parameter of a SamNetwork as sites.

    Args:
        trunk: the sites of a timm network that stands at `image_encoder.trunk`, as it names them; None for SAM's own encoder.
    """

    def fused(path: str, module: nn.Module) -> Sequence[str] | None:
        parent, _, child = path.rpartition(".")
        stacked = child == "qkv" and isinstance(network.get_submodule(parent), Attention)
        return [f"{RENAME(parent)}.{part}" for part in "qkv"] if stacked else None

    own = enumerate_sites(network, RENAME, fused, {"image_encoder": ("start",)})
    if trunk is None:
        return [_moved(site) for site in own]
    below = "image_encoder.trunk"
    placed = [replace(site, reader=f"{below}.{site.reader}" if site.reader else below) for site in trunk]
    return placed + [_moved(site) for site in own if not site.path.startswith(f"{below}.")]


def _moved(site: Site) -> Site:
    """The site with the module that really reads it."""
    for reader, (call, tables) in READ_BY_PARENT.items():
        inner = site.path.removeprefix(f"{reader}.")
        if inner != site.path and inner.startswith(tables):
            return replace(site, reader=reader, parameter=inner, calls=(call,))
    return site
