"""softmax(q k^T) v, by whatever is fastest on the processor at hand.

On CPUs in bfloat16 torch's kernel takes two to five times as long as two matrix products (AMD EPYC, forward and backward, heads of 64: 8
pictures of 12 heads and 197 tokens 50 ms against 18, 100 of 8 heads and 77 tokens 164 against 45). Products hold all scores, though, whose
memory, new at every layer, costs more than the arithmetic where they are many: then pieces that fit the cache (8 pictures of 12 heads and
577 tokens 332 ms by the kernel, 260 by products, 162 in pieces).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HELD = 12 * 2**20  # scores; from here on pieces are the faster way
PIECE = 512  # queries


def dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """scaled_dot_product_attention of q (batch, heads, queries, depth), k and v (batch, heads, keys, depth).

    Args:
        mask: added to the scores, or boolean with True for what may be seen; it can be broadcast.
    """
    few = _are_few(q, k)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or dropout or not (few or mask is None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    q = q * q.shape[-1] ** -0.5
    return by_products(q, k, v, mask) if few else in_pieces(q, k, v)


def faster_way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """by_products() or in_pieces(), in bfloat16 on a CPU."""
    return by_products(q, k, v) if _are_few(q, k) else in_pieces(q, k, v)


def _are_few(q: Tensor, k: Tensor) -> bool:
    return q.shape[:-1].numel() * k.shape[-2] < HELD


def by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of queries that are scaled already. The weights are held for the backward pass."""
    scores = q @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


def in_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, PIECE queries of one head at a time, whose weights are computed anew in the backward pass; v may be of another depth."""
    heads = [each.reshape(-1, *each.shape[-2:]) for each in (q, k, v)]
    return _Pieces.apply(*heads).view(*q.shape[:-1], v.shape[-1])


class _Pieces(torch.autograd.Function):
    """q (heads, queries, d), k (heads, keys, d), v (heads, keys, dv)."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        with torch.autocast(q.device.type, enabled=False):
            for head in range(len(q)):
                for here in _pieces(q):
                    out[head, here] = (q[head, here] @ k[head].mT).softmax(-1) @ v[head]
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out = ctx.saved_tensors
        gq = torch.empty_like(q)
        gk, gv = (torch.zeros_like(each, dtype=torch.float32) for each in (k, v))  # sums of pieces
        with torch.autocast(q.device.type, enabled=False):
            mean = (g * out).sum(-1, keepdim=True)  # of the weights' gradients, under the weights
            for head in range(len(q)):
                for here in _pieces(q):
                    piece, g_piece = q[head, here], g[head, here]
                    weights = (piece @ k[head].mT).softmax(-1)
                    gv[head] += weights.mT @ g_piece
                    g_scores = (g_piece @ v[head].mT).sub_(mean[head, here]).mul_(weights)
                    gq[head, here] = g_scores @ k[head]
                    gk[head] += g_scores.mT @ piece
        return gq, gk.to(k.dtype), gv.to(v.dtype)


def _pieces(q: Tensor) -> list[slice]:
    return [slice(start, start + PIECE) for start in range(0, q.shape[-2], PIECE)]
