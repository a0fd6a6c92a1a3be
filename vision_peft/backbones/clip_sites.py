"""Canonical names for every parameter of an open_clip model: its own towers by rules, other towers as Vit names them."""

from __future__ import annotations

from dataclasses import replace

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from vision_peft.backbones import bert_names
from vision_peft.backbones.clip_network import EXTENDED
from vision_peft.backbones.timm_sites import name_sites, trace
from vision_peft.engine.site import Role, Site, enumerate_sites, renamer

_RULES: list[tuple[str, str]] = [
    (r"visual\.conv1", "vision.patch_embed"),
    (r"visual\.ln_pre", "vision.norm_pre"),
    (r"visual\.ln_post", "vision.norm"),
    (r"visual\.head\.proj", "vision.proj"),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc", r"vision.\1.mlp.fc1"),
    (r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj", r"vision.\1.mlp.fc2"),
    (r"visual\.transformer\.resblocks\.(\d+)\.ln_([12])", r"vision.\1.norm\2"),
    (r"visual\.transformer\.resblocks\.(\d+)\.(.+)", r"vision.\1.\2"),
    (r"visual\.(.+)", r"vision.\1"),
    (r"(?:text\.)?token_embedding", "text.token_embed"),
    (r"(?:text\.)?ln_final", "text.norm"),
    (r"(?:text\.)?text_projection", "text.projection"),
    (r"(?:text\.)?transformer\.resblocks\.(\d+)\.mlp\.c_fc", r"text.\1.mlp.fc1"),
    (r"(?:text\.)?transformer\.resblocks\.(\d+)\.mlp\.c_proj", r"text.\1.mlp.fc2"),
    (r"(?:text\.)?transformer\.resblocks\.(\d+)\.ln_([12])", r"text.\1.norm\2"),
    (r"(?:text\.)?transformer\.resblocks\.(\d+)\.(.+)", r"text.\1.\2"),
]

_BARE: dict[str, tuple[str, Role]] = {  # by state_dict key: what a tower or the root owns itself
    "visual.class_embedding": ("vision.class_embedding", "other"),
    "visual.positional_embedding": ("vision.pos_embed", "other"),
    "visual.proj": ("vision.proj", "weight"),
    "visual.attnpool.positional_embedding": ("vision.attnpool.pos_embed", "other"),
    "visual.trunk.cls_token": ("vision.class_embedding", "other"),
    "visual.trunk.pos_embed": ("vision.pos_embed", "other"),
    "positional_embedding": ("text.pos_embed", "other"),
    "text_projection": ("text.projection", "weight"),
    "text.cls_emb": ("text.class_embedding", "other"),
    "text.positional_embedding": ("text.pos_embed", "other"),
    "text.text_projection": ("text.projection", "weight"),
    "logit_scale": ("logit_scale", "other"),
    "logit_bias": ("logit_bias", "other"),
}

POSITIONS = frozenset({"visual.positional_embedding", "visual.attnpool.positional_embedding", "visual.trunk.pos_embed"})

AFTER_BLOCKS = frozenset({"norm", "proj", "attn_pool", "attn_pool_contrastive"})  # of the vision tower


def name_clip_sites(network: nn.Module, image_size: int) -> list[Site]:
    """Every parameter of a network of the meta device: open_clip's own towers by the rules above, the rest as Vit names it."""
    extended = {path: module for path, module in network.named_modules() if type(module) in EXTENDED.values()}
    calls = {path: module.calls for path, module in extended.items() if hasattr(module, "calls")}
    foreign = _foreign_sites(network.visual, image_size)
    own = enumerate_sites(network, renamer([*bert_names.RULES, *_RULES]), calls=calls)
    return [_bare(named) for site in own for named in foreign.get(site.path, [site])]


def _foreign_sites(visual: nn.Module, image_size: int) -> dict[str, list[Site]]:
    """Sites by state_dict key of a vision tower, or the part of one, that is not open_clip's transformer."""
    if isinstance(visual, VisionTransformer):
        return {}
    path, tower = ("visual.trunk", visual.trunk) if isinstance(visual, TimmModel) else ("visual", visual)
    called, _ = trace(tower, image_size)
    sites: dict[str, list[Site]] = {}
    for site in name_sites(tower, called, ("forward",)):
        site = replace(site, reader=f"{path}.{site.reader}" if site.reader else path)
        sites.setdefault(site.path, []).append(site)
    return sites


def _bare(site: Site) -> Site:
    """The site, with the canonical name and role of its tensor if no layer owns that."""
    if site.path not in _BARE:
        return site
    name, role = _BARE[site.path]
    return replace(site, name=name, target=name, role=role, kind="bare" if role == "weight" else "vector")
