"""How a backbone name becomes a timm architecture and the defaults that suit its weights."""

from __future__ import annotations

from dataclasses import dataclass

import timm

from vision_peft.backbones.offline import CARRIERS
from vision_peft.errors import UserError, nearest


@dataclass(frozen=True)
class Recipe:
    """Defaults of one set of weights.

    Attributes:
        architecture: timm model name.
        image_size: side of the square input in pixels.
        depth: number of blocks kept; None for all.
        mean_std: one value for mean and std of all channels, where the weights want others than timm's.
    """

    architecture: str
    image_size: int
    depth: int | None = None
    mean_std: float | None = None


RECIPES = {
    "offline:dinov2_vits14": Recipe("vit_small_patch14_dinov2.lvd142m", image_size=112, depth=9),
    "offline:effnet_lite0": Recipe("tf_efficientnet_lite0", image_size=160, mean_std=0.5),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of an offline name, or timm's own defaults for a timm name; UserError with the nearest names for any other."""
    if name in RECIPES:
        return RECIPES[name]
    if name in CARRIERS:
        raise UserError(f"backbone {name}: holds no image encoder; offline image encoders are {', '.join(RECIPES)}")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(f"backbone {name!r} is unknown to timm and to the offline weights{nearest(name, [*RECIPES, *timm.list_models()])}")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        raise UserError(f"backbone {name!r}: timm knows no weights {tag!r} for {architecture}{nearest(name, tagged)}")
    return Recipe(name, image_size=timm.get_pretrained_cfg(name).input_size[-1])
