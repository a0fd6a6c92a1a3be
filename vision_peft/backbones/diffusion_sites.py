"""Canonical names of a diffusers denoiser: `unet.down.1.attentions.0.0.cross.attn.q`, `unet.mid.resnets.0.conv1`, `dit.3.self.attn.v`.

A UNet's block keeps its place (`down.1`, `mid`, `up.0`); attention ends in attn.{q,k,v,out} and feed-forward in mlp.{fc1,fc2}, so that the
presets mean what they mean elsewhere. `self` and `cross` tell a transformer block's two attentions apart (a pattern `unet.*.cross.*`).
"""

from __future__ import annotations

from torch import nn

from vision_peft.engine.site import Site, enumerate_sites, renamer

_BLOCK = r"(?:transformer_blocks|single_transformer_blocks)\.(\d+)"
# (within a transformer block, its canonical name); the order counts
_PARTS = [
    (r"attn1\.to_([qkv])", r"self.attn.{0}"),
    (r"attn1\.to_out\.0", r"self.attn.out"),
    (r"attn2\.to_([qkv])", r"cross.attn.{0}"),
    (r"attn2\.to_out\.0", r"cross.attn.out"),
    (r"attn\.to_([qkv])", r"attn.{0}"),
    (r"attn\.to_out\.0", r"attn.out"),
    (r"attn\.add_([qkv])_proj", r"context.attn.{0}"),  # joint attention of text and picture (SD 3)
    (r"attn\.to_add_out", r"context.attn.out"),
    (r"ff\.net\.0\.proj", r"mlp.fc1"),
    (r"ff\.net\.2", r"mlp.fc2"),
    (r"ff_context\.net\.0\.proj", r"context.mlp.fc1"),
    (r"ff_context\.net\.2", r"context.mlp.fc2"),
    (r"(.+)", r"{0}"),
]
_PLACES = [(r"(down|up)_blocks\.(\d+)\.", r"unet.\1.\2."), (r"mid_block\.", r"unet.mid.")]


def _rules(transformer: bool) -> list[tuple[str, str]]:
    rules = []
    if transformer:
        for inner, name in _PARTS:
            rules.append((rf"{_BLOCK}\.{inner}", rf"dit.\1.{name.format(chr(92) + '2')}"))
        return [*rules, (_BLOCK, r"dit.\1"), (r"", "dit"), (r"(.+)", r"dit.\1")]
    for place, name in _PLACES:
        groups = place.count("(")
        first, second = (rf"\{groups + 1}", rf"\{groups + 2}")
        for inner, part in _PARTS:
            own = part.format(rf"\{groups + 3}")
            rules.append((rf"{place}attentions\.(\d+)\.{_BLOCK}\.{inner}", rf"{name}attentions.{first}.{second}.{own}"))
        rules.append((rf"{place}attentions\.(\d+)\.to_([qkv])", rf"{name}attentions.{first}.attn.{second}"))  # of UNet2DModel
        rules.append((rf"{place}attentions\.(\d+)\.to_out\.0", rf"{name}attentions.{first}.attn.out"))
        rules.append((rf"{place}(.+)", rf"{name}{first}"))
    return [*rules, (r"", "unet"), (r"(.+)", r"unet.\1")]


def name_denoiser_sites(network: nn.Module) -> list[Site]:
    """Every parameter of a UNet or of a transformer as sites."""
    transformer = not hasattr(network, "down_blocks")
    return enumerate_sites(network, renamer(_rules(transformer)))
