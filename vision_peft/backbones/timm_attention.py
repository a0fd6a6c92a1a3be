"""timm's attention, with torch's kernel where that is the faster way."""

from __future__ import annotations

import torch
from timm.layers.attention import Attention
from torch import nn

from vision_peft.engine.attention import LONGEST


class ChosenAttention(Attention):
    """An instance of timm's Attention becomes one by its `__class__`; timm asks `fused_attn` at each call.

    See engine.attention.dot_product: on CPUs in bfloat16 matrix products take a fifth of the kernel's time, forward and backward.
    """

    @property
    def fused_attn(self) -> bool:
        weight = self.qkv.weight
        if weight.device.type != "cpu":
            return True
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        return dtype != torch.bfloat16


def choose_attention(network: nn.Module) -> None:
    """Put it in the place of the plain attention of a vision transformer whose images have few patches."""
    patches = getattr(getattr(network, "patch_embed", None), "num_patches", None)
    if patches is None or patches > LONGEST:
        return
    for module in network.modules():
        if type(module) is Attention:
            module.__class__ = ChosenAttention
