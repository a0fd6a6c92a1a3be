"""SAM's attention with its relative positions inside the scores' one product.

    scores = s q k^T + (R_h q)[h of key] + (R_w q)[w of key] = q' k'^T,
    q' = [s q, R_h q, R_w q] (n, d + H + W),  k' = [k, one-hot of h, one-hot of w]

The stock layer builds the scores (n, n) three times and keeps them; here nothing but a product of slightly longer vectors is left, so that
torch's memory-saving kernel can run where an image has many tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import Tensor, nn

from vision_peft.engine.dot_product import by_products, faster_way

LONGEST = 1024  # tokens, of images whose weights are held in float32

class FoldedAttention(Attention):
    """An instance of segment-anything's attention becomes one by its `__class__`; same parameters, same function."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).view(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)  # (B, heads, HW, d)
        scaled = q * self.scale
        if self.use_rel_pos:
            grid = q.reshape(B, self.num_heads, H, W, -1)
            above = torch.einsum("bnhwd,hkd->bnhwk", grid, get_rel_pos(H, H, self.rel_pos_h).to(q.dtype)).flatten(2, 3)  # (B, heads, HW, H)
            beside = torch.einsum("bnhwd,wkd->bnhwk", grid, get_rel_pos(W, W, self.rel_pos_w).to(q.dtype)).flatten(2, 3)
            scaled = torch.cat([scaled, above, beside], -1)
            k = torch.cat([k, _places(H, W, k).expand(B, self.num_heads, -1, -1)], -1)
        y = _attend(scaled, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, H, W, C))


def fold_attention(encoder: nn.Module) -> None:
    """Put it in the place of every attention of an image encoder."""
    for module in encoder.modules():
        if type(module) is Attention:
            module.__class__ = FoldedAttention


def _places(H: int, W: int, like: Tensor) -> Tensor:
    """(HW, H + W): the row and the column of each token, one-hot."""
    rows = torch.eye(H, dtype=like.dtype, device=like.device).repeat_interleave(W, 0)
    columns = torch.eye(W, dtype=like.dtype, device=like.device).repeat(H, 1)
    return torch.cat([rows, columns], 1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v, scaled already. Long sequences go a way that never holds all scores: torch's kernel, or pieces."""
    on_cpu = q.device.type == "cpu"
    if on_cpu and q.dtype == torch.bfloat16:
        return faster_way(q, k, v)
    return by_products(q, k, v) if on_cpu and q.shape[-2] <= LONGEST else _by_kernel(q, k, v)


def _by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    padded = F.pad(v, (0, q.shape[-1] - v.shape[-1]))  # the kernels want q, k and v of one width
    return F.scaled_dot_product_attention(q, k, padded, scale=1.0)[..., : v.shape[-1]]
