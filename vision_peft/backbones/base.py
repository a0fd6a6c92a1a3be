"""What every backbone offers: a network on the meta device until load(), named sites, preprocessing, features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_peft.engine.site import Site


@dataclass(frozen=True)
class Preprocess:
    """How pictures become the network's input: RGB in [0, 1], resized to `size` pixels, minus `mean`, over `std`."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"  # a name of torchvision.transforms.InterpolationMode
    crop: float = 1.0  # evaluation resizes the short side to size / crop and takes the centre


class Backbone(nn.Module, ABC):
    """A pretrained network and what the rest needs to know of it; it knows nothing of adapters.

    Construction is cheap and reads no weights: `network` lives on the meta device, so that site names, shapes and the
    number of features are known and a config can be checked. `load()` puts the real network in place.

    Attributes:
        network: the third-party module; its state_dict keys are its own.
        num_features: length of the feature vector of one image.
        preprocess: see Preprocess.
        resized: state_dict keys whose values depend on the image size (position tables): left out of the fingerprint.
        adapted: canonical names of the layers whose weights change in training; whatever does not depend on them may be cached.
    """

    network: nn.Module
    num_features: int
    preprocess: Preprocess
    resized: frozenset[str] = frozenset()
    adapted: frozenset[str] = frozenset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """Moves and casts wait for load(): tensors on the meta device have no values, and Lightning tidies up after an early error."""
        return self if any(parameter.is_meta for parameter in self.parameters()) else super()._apply(fn, recurse)

    @abstractmethod
    def load(self) -> None:
        """Read the weights and put the real network in place; does nothing the second time. Freezes it (requires_grad False)."""

    @abstractmethod
    def sites(self) -> list[Site]:
        """Every parameter of `network` as sites with canonical names; works before load()."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of preprocessed images (B, 3, H, W)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What identifies it in a config and a card: class name, model name, weights, image size."""

    def example(self) -> tuple[Any, ...]:
        """Arguments of forward() that are the same every time: two random images. After load()."""
        size = self.preprocess.size
        return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)),)

    def unfreeze(self) -> None:
        """Train every weight, and BatchNorm's statistics where there are any: pre-training, not adaptation. After load()."""
        self.network.requires_grad_(True)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups of an unfrozen backbone: biases and norms do not decay, nor does LARS scale their rate."""
        return decay_groups(self, lr, "backbone")

    @property
    def num_blocks(self) -> int:
        """Number of blocks at which the forward pass can be cut (0: it cannot)."""
        return 0

    def first_block(self, targets: set[str]) -> int:
        """Index of the first block any of these layers (canonical names) belongs to.

        num_blocks if none belongs to a block; 0 if one comes before the blocks or is a tensor of the root.
        """
        return 0

    def prefix(self, images: Tensor, block: int) -> Tensor:
        """Hidden state that enters block number `block`."""
        raise TypeError(f"{type(self).__name__} has no blocks to cut at")

    def suffix(self, hidden: Tensor, block: int) -> Tensor:
        """Features from the hidden state that enters block number `block`; suffix(prefix(x, k), k) equals forward(x)."""
        raise TypeError(f"{type(self).__name__} has no blocks to cut at")


def decay_groups(module: nn.Module, lr: float, name: str) -> list[dict[str, Any]]:
    """Matrices and kernels in one optimizer group, vectors and numbers, without weight decay, in another."""
    own = [parameter for parameter in module.parameters() if parameter.requires_grad]
    flat = [parameter for parameter in own if parameter.ndim <= 1]
    return [
        {"params": [parameter for parameter in own if parameter.ndim > 1], "lr": lr, "name": name},
        {"params": flat, "lr": lr, "name": f"{name}/vectors", "weight_decay": 0.0},
    ]
