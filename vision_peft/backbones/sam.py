"""Segment Anything (Kirillov et al., ICCV 2023) as a backbone: an image encoder, prompts, and a decoder that turns both into masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from vision_peft.backbones.base import Preprocess
from vision_peft.backbones.offline import announce
from vision_peft.backbones.sam_checkpoint import load_sam
from vision_peft.backbones.sam_network import SHAPES, WIDTH, SamEncoder, SamNetwork
from vision_peft.backbones.sam_sites import name_sam_sites
from vision_peft.backbones.segmentation import Masks, Prompts, SegmentationBackbone
from vision_peft.backbones.timm_cuts import find_cuts
from vision_peft.backbones.timm_trunk import TimmEncoder
from vision_peft.backbones.vit import Vit
from vision_peft.engine.site import Site
from vision_peft.errors import UserError

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of 0..255
START = 0  # seed of what no file fills


class Sam(SegmentationBackbone):
    """SAM at any input size, with its own image encoder or timm's.

    What no checkpoint fills (everything without one, a semantic head's tokens, the neck of a timm encoder) starts from a fixed seed,
    so that an adapter folder need not hold it. Train it: `adapter.train: ["neck.*", "decoder.*", "prompt.*"]`.

    Args:
        name: `vit_b`, `vit_l`, `vit_h`, `tiny` (random only), or a timm name or `offline:dinov2_vits14`, `offline:effnet_lite0`, whose
            features then go through SAM's neck.
        image_size: side of the square input, a multiple of 16 (of the patch size for a timm encoder).
        checkpoint: SAM's file; position tables are resized to the image size, and what was done with each key is told. null: random.
        classes: foreground classes of a semantic head, one mask each and one of the background (SAMed); null: one mask a prompt.
        compat: `sam`; or `salt`, the network of S-SAM and SALT: no windows, no relative positions, a decoder without positions.
        levels: depths of a timm encoder whose features are joined, as its forward_intermediates counts; null: three spread over a
            transformer, strides 8 and 16 of a convolutional network.
        depth: blocks of a timm transformer that are kept; null: all.
        pretrained: False starts a timm encoder from random weights.
        gradient_checkpointing: recompute each block of SAM's encoder in the backward pass: less memory, a third more time.

    Raises:
        UserError: unknown name, impossible size or levels, a checkpoint that is not there. No weights are read.
    """

    takes_prompts = True

    def __init__(
        self,
        name: str = "vit_b",
        *,
        image_size: int = 1024,
        checkpoint: str | None = None,
        classes: int | None = None,
        compat: Literal["sam", "salt"] = "sam",
        levels: list[int] | None = None,
        depth: int | None = None,
        pretrained: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.image_size, self.checkpoint, self.classes = name, image_size, checkpoint, classes
        self.compat, self.depth, self.pretrained, self.gradient_checkpointing = compat, depth, pretrained, gradient_checkpointing
        self._check(levels)
        options = {"image_size": image_size, "depth": _depth(name, depth), "pretrained": pretrained}
        timm_encoder = None if name in SHAPES else Vit(name, **options)
        object.__setattr__(self, "_vit", timm_encoder)  # not a child: its network becomes a part of this one's
        self.levels = self._chosen(levels) if self._vit is not None else None
        self._loaded = False
        with torch.device("meta"):
            self.network = self._create()
        trunk = self._vit.sites() if self._vit is not None else None
        self._sites = name_sam_sites(self.network, trunk)
        self.num_features = WIDTH
        grid = self.network.image_encoder.grid
        self.mask_size = (4 * grid[0], 4 * grid[1])
        tables = ("pos_embed", "rel_pos_h", "rel_pos_w")
        self.resized = frozenset(key for key in self.network.state_dict() if key.rpartition(".")[2] in tables)
        if self._vit is None:
            self.preprocess = Preprocess(image_size, tuple(each / 255 for each in MEAN), tuple(each / 255 for each in STD))
        else:
            self.preprocess = self._vit.preprocess
        self.train(self.training)

    def load(self) -> None:
        if self._loaded:
            return
        if self._vit is not None:
            self._vit.load()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(START)
            network = self._create()
        if self.checkpoint is not None:
            options = {"classes": self.classes, "pooled": self.compat == "salt", "own_encoder": self._vit is None}
            announce(f"{self.checkpoint}: {load_sam(network, Path(self.checkpoint), **options)}")
        elif self._vit is None:
            announce(f"backbone {self.name}: no checkpoint is given, so its weights are random")
        self.network = network.requires_grad_(False)
        self._loaded = True
        self.train(self.training)

    def sites(self) -> list[Site]:
        return list(self._sites)

    def forward(self, images: Tensor) -> Tensor:
        """Image embedding (B, 256, h, w) of images (B, 3, S, S)."""
        return self.network.image_encoder(images)

    def decode(self, embedding: Tensor, prompts: Prompts | None = None) -> Masks:
        return self.network.decode(embedding, prompts)

    @property
    def num_blocks(self) -> int:
        """Steps of the image encoder; the last is the neck."""
        return self.network.image_encoder.steps

    def first_block(self, targets: set[str]) -> int:
        encoder, prefix = self.network.image_encoder, "image_encoder."
        inside = [site.path for site in self._sites if site.target in targets and site.path.startswith(prefix)]
        return min((encoder.step_of(path.removeprefix(prefix)) for path in inside), default=self.num_blocks)

    def prefix(self, images: Tensor, block: int) -> Tensor:
        encoder = self.network.image_encoder
        return encoder.run(encoder.start(images), 0, block)

    def suffix(self, hidden: Tensor, block: int) -> Tensor:
        return self.network.image_encoder.run(hidden, block, self.num_blocks)

    def train(self, mode: bool = True) -> Sam:
        """Set the mode of everything but BatchNorm, as Vit does."""
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def describe(self) -> dict[str, Any]:
        keys = ("name", "image_size", "checkpoint", "classes", "compat", "levels", "depth")
        inner = {"encoder": self._vit.describe()} if self._vit is not None else {}
        return {"class": type(self).__name__, **{key: getattr(self, key) for key in keys}, **inner}

    def _create(self) -> SamNetwork:
        def encoder() -> torch.nn.Module:
            if self._vit is not None:
                return TimmEncoder(self._vit.network, self.levels, self.image_size, WIDTH)
            stock = self.compat == "sam"
            return SamEncoder(SHAPES[self.name], self.image_size, stock, stock, self.gradient_checkpointing)

        return SamNetwork(encoder, self.image_size, self.classes, plain=self.compat == "salt")

    def _check(self, levels: list[int] | None) -> None:
        own = self.name in SHAPES
        if self.classes is not None and self.classes < 1:
            raise UserError(f"backbone {self.name}: classes is {self.classes}, must be at least 1 (or null)")
        if own and (self.image_size < 16 or self.image_size % 16):
            below = max(self.image_size // 16, 1) * 16
            raise UserError(f"backbone {self.name}: image_size {self.image_size} is not a multiple of 16; nearest is {below}")
        for key, given in (("levels", levels), ("depth", self.depth)):
            if own and given is not None:
                raise UserError(f"backbone {self.name}: {key} is for timm encoders")
        if not own and self.gradient_checkpointing:
            raise UserError(f"backbone {self.name}: gradient_checkpointing is for SAM's own encoders")
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise UserError(f"backbone {self.name}: checkpoint {self.checkpoint} does not exist")

    def _chosen(self, levels: list[int] | None) -> list[int]:
        network = self._vit.network
        if find_cuts(network) is None or not hasattr(network, "forward_intermediates"):
            raise UserError(f"backbone {self.name}: {type(network).__name__} does not give intermediate features that adapters can reach")
        if hasattr(network, "feature_info") and not self._vit.is_transformer:
            available = len(network.feature_info)
            default = [i for i, info in enumerate(network.feature_info) if info["reduction"] in (8, 16)]
        else:
            available = self._vit.num_blocks
            default = sorted({available // 3 - 1, 2 * available // 3 - 1, available - 1})
        chosen = default if levels is None else levels
        if not chosen or not all(0 <= each < available for each in chosen):
            raise UserError(f"backbone {self.name}: levels are {chosen}, must be from 0 to {available - 1}")
        return list(chosen)


def _depth(name: str, depth: int | None) -> int | None:
    """For dense features the whole of the offline DINOv2 is of use, not only the blocks that recognise best."""
    return 12 if depth is None and name == "offline:dinov2_vits14" else depth
