"""nn.MultiheadAttention's self-attention over (batch, length, width), with any linear map in the place of its own.

torch's own forward turns batches around and, where the weights are frozen and a gradient passes through, copies the weight once a
position in the backward pass (measured on a frozen CLIP ViT-B/16 in bf16: six times the whole step). Here every projection is one
matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.engine.dot_product import dot_product

Linear = Callable[[Tensor, str, str], Tensor]  # x and the names of weight and bias in the module -> the map's output


class BatchedAttention(nn.MultiheadAttention):
    """Computes the same, from the same parameters; an instance of nn.MultiheadAttention becomes one by its `__class__`."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not is_plain(self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal):
            options: dict[str, Any] = {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
            options |= {"average_attn_weights": average_attn_weights, "is_causal": is_causal}
            return super().forward(query, key, value, **options)
        return attention(self, query, attn_mask, lambda x, weight, bias: F.linear(x, self.get_parameter(weight), _bias(self, bias))), None


def is_plain(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> bool:
    """Whether a call is batched self-attention without returned weights: what CLIP's towers ask for, and attention() computes."""
    return is_self_attention(module, query, key, value, padding) and not need_weights and not (is_causal and attn_mask is None)


def is_self_attention(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> bool:
    """Whether a call is batched self-attention without padding mask and without what a module may add to keys and values."""
    plain = module._qkv_same_embed_dim and module.bias_k is None and module.bias_v is None and not module.add_zero_attn
    return plain and query is key and key is value and padding is None and query.dim() == 3


def attention(module: nn.MultiheadAttention, query: Tensor, attn_mask: Tensor | None, linear: Linear) -> Tensor:
    """Output of the module, in the layout of `query`."""
    out = linear(attend(module, query, attn_mask, linear), "out_proj.weight", "out_proj.bias")
    return out if module.batch_first else out.transpose(0, 1)


def attend(module: nn.MultiheadAttention, query: Tensor, attn_mask: Tensor | None, linear: Linear) -> Tensor:
    """What the output projection multiplies, (batch, length, width)."""
    x = query if module.batch_first else query.transpose(0, 1)
    batch, length, width = x.shape
    qkv = linear(x, "in_proj_weight", "in_proj_bias")
    q, k, v = qkv.view(batch, length, 3, module.num_heads, module.head_dim).permute(2, 0, 3, 1, 4)
    if attn_mask is not None:
        # nn.MultiheadAttention marks with True what must not be seen, scaled_dot_product_attention what may
        attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)
        if attn_mask.dim() == 3:  # (batch * heads, length, length)
            attn_mask = attn_mask.view(batch, module.num_heads, length, length)
    attended = dot_product(q, k, v, attn_mask, module.dropout if module.training else 0.0)
    return attended.transpose(1, 2).reshape(batch, length, width)


def _bias(module: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)
