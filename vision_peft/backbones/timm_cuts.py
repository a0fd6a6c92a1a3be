"""Where the forward pass of a timm network can be cut in two, so that what comes before the first adapted block runs once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


@dataclass(frozen=True)
class Cuts:
    """The forward pass as a chain: each step of `before`, each block, each step of `after`, then the network's forward_head.

    Attributes:
        before: attributes of the network (modules or methods) that run before the blocks.
        blocks: module paths of the blocks.
        after: attributes that run between the last block and forward_head.
        root_calls: the network's methods that read tensors which the network itself owns (position table, class token).
    """

    before: tuple[str, ...]
    blocks: tuple[str, ...]
    after: tuple[str, ...]
    root_calls: tuple[str, ...] = ("forward",)

    def prefix(self, network: nn.Module, images: Tensor, block: int) -> Tensor:
        """Hidden state that enters block number `block`; its shape is the architecture's own."""
        hidden = images
        for step in self.before:
            hidden = getattr(network, step)(hidden)
        for path in self.blocks[:block]:
            hidden = network.get_submodule(path)(hidden)
        return hidden

    def suffix(self, network: nn.Module, hidden: Tensor, block: int) -> Tensor:
        """Features (B, num_features) from the hidden state that enters block number `block`."""
        for path in self.blocks[block:]:
            hidden = network.get_submodule(path)(hidden)
        for step in self.after:
            hidden = getattr(network, step)(hidden)
        return network.forward_head(hidden)

    def block_of(self, path: str) -> int:
        """Index of the block that owns the parameter with this state_dict key: 0 before the blocks, len(blocks) after them."""
        for index, block in enumerate(self.blocks):
            if path.startswith(f"{block}."):
                return index
        first, dot, _ = path.partition(".")
        return 0 if not dot or first in self.before else len(self.blocks)


# What forward_features of these classes does: (steps before, the container of the blocks or the blocks, steps after, root_calls).
# `_pos_embed` is the one method of a VisionTransformer that reads its class token, registers and position table; naming it
# instead of `forward` makes adapters of these tensors work in a cut pass, which never calls the network's own forward.
CHAINS: dict[type[nn.Module], tuple[tuple[str, ...], str | tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    VisionTransformer: (("patch_embed", "_pos_embed", "patch_drop", "norm_pre"), "blocks", ("norm",), ("_pos_embed",)),
    SwinTransformer: (("patch_embed",), "layers", ("norm",), ("forward",)),
    ConvNeXt: (("stem",), "stages", ("norm_pre",), ("forward",)),
    EfficientNet: (("conv_stem", "bn1"), "blocks", ("conv_head", "bn2"), ("forward",)),
    ResNet: (("conv1", "bn1", "act1", "maxpool"), ("layer1", "layer2", "layer3", "layer4"), (), ("forward",)),
}


def find_cuts(network: nn.Module) -> Cuts | None:
    """How this network may be cut; None where that is not known to be exact, e.g. for a subclass with a forward pass of its own."""
    for kind, (before, blocks, after, root_calls) in CHAINS.items():
        same = type(network).forward is kind.forward and type(network).forward_features is kind.forward_features
        if isinstance(network, kind) and same:
            paths = tuple(_children(network, blocks)) if isinstance(blocks, str) else blocks
            return Cuts(before, paths, after, root_calls)
    return None


def _children(network: nn.Module, container: str) -> Iterator[str]:
    for name, _ in network.get_submodule(container).named_children():
        yield f"{container}.{name}"
