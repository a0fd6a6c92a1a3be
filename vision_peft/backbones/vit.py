"""Image encoders by timm: vision transformers and convolutional networks, as features out of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vision_peft.backbones import offline
from vision_peft.backbones.base import Backbone, Preprocess
from vision_peft.backbones.recipes import RECIPES, Recipe, find_recipe
from vision_peft.backbones.timm_attention import choose_attention
from vision_peft.backbones.timm_cuts import find_cuts
from vision_peft.backbones.timm_sites import is_stack, name_sites, trace
from vision_peft.backbones.timm_weights import check_weights_file, first_line, load_weights
from vision_peft.engine.site import Site
from vision_peft.errors import UserError

# Last word of the state_dict keys whose tensors timm resamples to the image size.
POSITION_TABLES = ("pos_embed", "relative_position_bias_table")


class Vit(Backbone):
    """Any timm network without its classifier.

    About `offline:dinov2_vits14`: these are DINOv2's ViT-S/14 weights as a saliency detector ships them, and its last
    blocks recognise much worse than its middle ones, probably because the detector's training went through them. The
    default is therefore the first 9 of 12 blocks with the mean of the patch tokens; depth=12 gives the file's own network
    with its final LayerNorm and class token. Say so wherever figures from it are shown, and that 9 was chosen by test figures
    of caltech101, dtd10 and rsscn7, which are therefore slightly kind to it.

    A network cut by `depth` starts with a fresh final norm (weight 1, bias 0), because the stored one belongs to the output
    of the last block, and pools the mean of the patch tokens unless told otherwise.

    BatchNorm layers stay in eval mode whatever train() says: a frozen network must not drift, and running statistics are
    neither trained nor stored with an adapter, so that updating them would change the features behind the user's back.

    Args:
        name: a timm model name, with or without a pretrained tag, or `offline:dinov2_vits14`, `offline:effnet_lite0`.
        image_size: side of the square input in pixels; None for the recipe's or the model's own. Transformers need a multiple
            of their patch size.
        depth: number of blocks kept, counted from the input; only for plain stacks of attention blocks.
        weights: local file for a timm name, .safetensors, .pt or .pth (read with weights_only).
        pretrained: False leaves random weights; True without `weights` takes timm's own download for a timm name.
        pool: `avg` mean of the patch tokens, `token` class token, `none` all patch tokens (or the whole map) one after another, for
            images in which the same place means the same; `default` the model's own way.
        dynamic: a vision transformer resamples its position table at every call, so that images of any multiple of its patches pass.

    Raises:
        UserError: unknown name, impossible size, depth or pool, or a weights file that is not there. No weights are read.
    """

    def __init__(
        self,
        name: str = "offline:dinov2_vits14",
        *,
        image_size: int | None = None,
        depth: int | None = None,
        weights: str | None = None,
        pretrained: bool = True,
        pool: Literal["default", "avg", "token", "none"] = "default",
        dynamic: bool = False,
    ) -> None:
        super().__init__()
        recipe = find_recipe(name)
        _check_arguments(name, image_size, weights, pretrained)
        self.name, self.weights, self.pretrained, self.pool = name, weights, pretrained, pool
        self.architecture, self.dynamic = recipe.architecture, dynamic
        self.image_size = recipe.image_size if image_size is None else image_size
        self.depth = recipe.depth if depth is None else depth
        self._loaded = self._whole = False
        self.network, called, self.num_features = self._outline(check_patch=image_size is not None)
        self._cuts = find_cuts(self.network)
        self._sites = name_sites(self.network, called, self._cuts.root_calls if self._cuts else ("forward",))
        self.resized = frozenset(key for key in self.network.state_dict() if key.rpartition(".")[2] in POSITION_TABLES)
        self.preprocess = self._preprocess(recipe)
        self.train(self.training)

    def load(self) -> None:
        """Read the weights and put the real network, frozen, in place of the outline; does nothing the second time.

        Raises:
            UserError: the weights cannot be fetched, or do not match the network name by name and shape by shape.
        """
        if self._loaded:
            return
        path = self._weights_file()
        if path is not None:
            network = self._create()
            load_weights(network, path)
        else:
            network = self._download() if self.pretrained else self._create()
        self.network = self._cut(network)
        self._loaded = True
        self.train(self.training)  # the new network takes over the mode of the outline

    def sites(self) -> list[Site]:
        return list(self._sites)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    @property
    def num_blocks(self) -> int:
        """Blocks of a vision transformer, stages of a convolutional network or Swin, 0 for other architectures."""
        return len(self._cuts.blocks) if self._cuts else 0

    @property
    def is_transformer(self) -> bool:
        """Whether it is a plain stack of attention blocks."""
        return is_stack(self.network)

    def first_block(self, targets: set[str]) -> int:
        if self._cuts is None:
            return 0
        found = [self._cuts.block_of(site.path) for site in self._sites if site.target in targets]
        return min(found, default=self.num_blocks)

    def prefix(self, images: Tensor, block: int) -> Tensor:
        return self._cuts.prefix(self.network, images, block) if self._cuts else super().prefix(images, block)

    def suffix(self, hidden: Tensor, block: int) -> Tensor:
        return self._cuts.suffix(self.network, hidden, block) if self._cuts else super().suffix(hidden, block)

    def unfreeze(self) -> None:
        super().unfreeze()
        self._whole = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Vit:
        """Set the mode of everything but BatchNorm, which stays in eval mode (see the class) unless all is trained."""
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, _BatchNorm) and not self._whole:
                module.eval()
        return self

    def describe(self) -> dict[str, Any]:
        """Class name, arguments as resolved, and the SHA-256 of offline weights (None for others)."""
        return {
            "class": type(self).__name__,
            "name": self.name,
            "architecture": self.architecture,
            "image_size": self.image_size,
            "depth": self.depth,
            "pool": self.pool,
            "pretrained": self.pretrained,
            "weights": self.weights,
            "sha256": offline.carrier(self.name).sha256 if self.pretrained and self.name in RECIPES else None,
        }

    def _outline(self, check_patch: bool) -> tuple[nn.Module, set[str], int]:
        """The network on the meta device, the paths of the modules that a forward pass calls, and the number of features."""
        try:
            with torch.device("meta"):
                whole = self._create()
            self._check_shape(whole, check_patch)
            network = self._cut(whole)
            called, (_, features) = trace(network, self.image_size)
        except UserError:
            raise
        except Exception as error:  # timm answers arguments that do not fit an architecture with whatever fails first
            raise UserError(
                f"backbone {self.name}: cannot be built with image_size {self.image_size}, depth {self.depth}, pool {self.pool}: "
                f"{first_line(error)}"
            ) from error
        return network, called, features

    def _create(self, pretrained: bool = False) -> nn.Module:
        """timm's network, whole, without classifier."""
        fixed = timm.get_pretrained_cfg(self.architecture).fixed_input_size  # False: takes every size, and no img_size argument
        options = {"img_size": self.image_size} if fixed else {}
        options |= {"dynamic_img_size": True} if fixed and self.dynamic else {}
        return timm.create_model(self.architecture, pretrained=pretrained, num_classes=0, **options)

    def _check_shape(self, whole: nn.Module, check_patch: bool) -> None:
        patch = getattr(getattr(whole, "patch_embed", None), "patch_size", None)
        if check_patch and patch and self.image_size % patch[0]:  # the models' own sizes are let through, as timm does
            below = self.image_size // patch[0] * patch[0]
            raise UserError(
                f"backbone {self.name}: image_size {self.image_size} is not a multiple of the patch size {patch[0]}; "
                f"nearest are {below or patch[0]} and {below + patch[0]}"
            )
        if self.depth is not None and not is_stack(whole):
            raise UserError(f"backbone {self.name}: depth applies to vision transformers, and {type(whole).__name__} is none")
        if self.depth is not None and not 1 <= self.depth <= len(whole.blocks):
            raise UserError(f"backbone {self.name}: depth is {self.depth}, must be from 1 to {len(whole.blocks)}")

    def _cut(self, network: nn.Module) -> nn.Module:
        """The whole network cut to `depth` blocks, pooled as asked, and frozen."""
        pool = self.pool
        if self.depth is not None and self.depth < len(network.blocks):
            network.blocks = network.blocks[: self.depth]
            for norm in (network.norm, getattr(network, "fc_norm", None)):
                if hasattr(norm, "reset_parameters"):  # an Identity has none
                    norm.reset_parameters()
            pool = "avg" if pool == "default" else pool
        if pool == "none":
            network.reset_classifier(0, "")
            owner, _, classifier = network.default_cfg["classifier"].rpartition(".")
            setattr(network.get_submodule(owner), classifier, Places(getattr(network, "num_prefix_tokens", 0)))
        elif pool != "default":
            network.reset_classifier(0, pool)
        choose_attention(network)
        return network.requires_grad_(False)

    def _weights_file(self) -> Path | None:
        if self.weights is not None:
            return Path(self.weights)
        return offline.fetch(self.name) if self.pretrained and self.name in RECIPES else None

    def _download(self) -> nn.Module:
        """timm's network with the weights timm knows for it."""
        try:
            return self._create(pretrained=True)
        except Exception as error:  # the outline was built with the same arguments: what fails here is the download
            raise UserError(
                f"backbone {self.name}: timm could not download its weights ({first_line(error)}); "
                f"give a local file (weights: PATH), one of {', '.join(RECIPES)}, or pretrained: false"
            ) from error

    def _preprocess(self, recipe: Recipe) -> Preprocess:
        config = timm.data.resolve_model_data_config(self.network)
        mean, std = config["mean"], config["std"]
        if recipe.mean_std is not None:
            mean = std = (recipe.mean_std,) * 3
        return Preprocess(self.image_size, tuple(mean), tuple(std), config["interpolation"], config["crop_pct"])


class Places(nn.Module):
    """(B, prefix + N, C) or (B, C, h, w) -> (B, N C), in the place of a classifier."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, self.prefix :] if x.ndim == 3 else x).flatten(1)


def _check_arguments(name: str, image_size: int | None, weights: str | None, pretrained: bool) -> None:
    """UserError where arguments are impossible by themselves, contradict each other or name no file."""
    if image_size is not None and image_size < 1:
        raise UserError(f"backbone {name}: image_size is {image_size}, must be positive")
    if weights is None:
        return
    if name in RECIPES:
        raise UserError(f"backbone {name}: has its own weights; give `weights` with a timm name such as {RECIPES[name].architecture}")
    if not pretrained:
        raise UserError(f"backbone {name}: `weights` and `pretrained: false` contradict each other")
    check_weights_file(Path(weights))
