"""y = scale * ((W + B A) x) + b in one matrix product, with gradients of B, A and scale that never form a dense weight gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_peft.engine.adapter import Factored
from vision_peft.linalg.dropout import dropout

Blocks = Sequence[tuple[tuple[int, int], Factored]]  # (first row, last row + 1) of disjoint row blocks, and their forms


def factored_linear(x: Tensor, W: Tensor, b: Tensor | None, blocks: Blocks, training: bool) -> Tensor:
    """The adapted linear map of x (..., in), W (out, in).

    Merged path: W + B A is built in float32 and rounded once to the compute type. Side path, y = W x + B (A x), summed before
    rounding: for dropout, and where W is stored in half precision, since rounding W + B A onto its grid would lose small updates.
    """
    form = stack_rows(blocks, W.shape[0])
    if W.dtype == torch.float32 and not (training and any(block.dropout > 0 for _, block in blocks)):
        return _Merged.apply(x.to(compute_dtype(x)), W, b, form.B, form.A, form.scale, _spans(blocks))[0]
    # every block drops by itself: the masks of q, k and v are independent
    low = [F.linear(dropout(x, block.dropout, training), block.A.to(x.dtype)) for _, block in sorted(blocks, key=_first_row)]
    return _side(x, W, b, form, torch.cat(low, dim=-1))


def stack_rows(blocks: Blocks, rows: int) -> Factored:
    """Factored forms of row blocks of one weight with `rows` rows, as one form without dropout.

    B becomes block diagonal and the A are stacked: q, k and v of a fused projection then share every pass over x.
    """
    if len(blocks) == 1 and blocks[0][0] == (0, rows):
        return blocks[0][1]._replace(dropout=0.0)
    ordered = sorted(blocks, key=_first_row)
    first = ordered[0][1]
    ranks = [form.A.shape[0] for _, form in ordered]
    B = first.B.new_zeros(rows, sum(ranks))
    scale = first.B.new_ones(rows) if any(form.scale is not None for _, form in ordered) else None
    column = 0
    for ((start, stop), form), rank in zip(ordered, ranks):
        B[start:stop, column : column + rank] = form.B
        if form.scale is not None:
            scale[start:stop] = form.scale
        column += rank
    return Factored(B, torch.cat([form.A for _, form in ordered]), scale)


def _spans(blocks: Blocks) -> list[tuple[slice, slice]]:
    """(rows, columns) of the trained parts of the stacked B: its diagonal blocks, less what is constant."""
    spans, column = [], 0
    for (start, stop), form in sorted(blocks, key=_first_row):
        rank = form.A.shape[0]
        spans.append((slice(start, stop), slice(column, column + (rank if form.trained is None else form.trained))))
        column += rank
    return spans


def _first_row(block: tuple[tuple[int, int], Factored]) -> int:
    return block[0][0]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type of products of x: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _side(x: Tensor, W: Tensor, b: Tensor | None, form: Factored, low: Tensor) -> Tensor:
    """`low` (..., r) is A x, whichever entries of x were dropped."""
    compute = compute_dtype(x)
    z = _Side.apply(x.to(compute), low.to(compute), W, form.B, b if form.scale is None else None)
    if form.scale is None:
        return z
    y = z * form.scale  # in float32: a scale near 1 rounded to half precision is 1
    return (y if b is None else y + b).to(compute)


def merged_weight(W: Tensor, B: Tensor, A: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale (W + B A) (out, in), built in float32 and rounded once to `dtype`."""
    with torch.autocast(W.device.type, enabled=False):
        merged = torch.addmm(W, B.to(W.dtype), A.to(W.dtype))
        if scale is not None:
            merged.mul_(scale[:, None])
        return merged.to(dtype)


class _Side(torch.autograd.Function):
    """W x + B low + b. In half precision one product, [W, B] [x, low]: a small branch does not survive being added to a rounded W x."""

    @staticmethod
    def forward(x: Tensor, low: Tensor, W: Tensor, B: Tensor, b: Tensor | None) -> Tensor:
        dtype = x.dtype
        b = None if b is None else b.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if dtype.itemsize > 2:
                return F.linear(x, W.to(dtype), b).add_(F.linear(low, B.to(dtype)))
            return F.linear(torch.cat([x, low], dim=-1), torch.cat([W.to(dtype), B.to(dtype)], dim=1), b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, low, W, B, b = inputs
        ctx.bias_dtype = None if b is None else b.dtype
        ctx.save_for_backward(low, W, B)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        low, W, B = ctx.saved_tensors
        needs_x, needs_low, _, needs_B, needs_b = ctx.needs_input_grad
        g = gy.reshape(-1, gy.shape[-1])  # (N, out)
        gx = glow = gB = gb = None
        with torch.autocast(gy.device.type, enabled=False):
            if needs_x:
                gx = (g @ W.to(g.dtype)).view(*gy.shape[:-1], W.shape[1])
            if needs_low:
                glow = (g @ B.to(g.dtype)).view(low.shape)
            if needs_B:
                gB = (low.reshape(-1, low.shape[-1]).mT @ g).mT.to(B.dtype)  # (r, N)(N, out)
            if needs_b:
                gb = g.sum(0).to(ctx.bias_dtype)
        return gx, glow, None, gB, gb


class _Merged(torch.autograd.Function):
    """Saves x and the factors; the merged weight is rebuilt in the backward pass, which costs 2 r per weight and saves a copy of W.

    Where scale is trained, the product without bias is kept for its gradient. The output itself is never kept: an activation in place
    may overwrite it, and a large bias would drown the product in it.
    """

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, A: Tensor, scale: Tensor | None, spans: list[tuple[slice, slice]]
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(x.device.type, enabled=False):
            if scale is None or not scale.requires_grad:
                return F.linear(x, merged_weight(W, B, A, scale, x.dtype), None if b is None else b.to(x.dtype)), None
            divisor = divisor_of(scale)
            z = F.linear(x, merged_weight(W, B, A, divisor, x.dtype))
            factor = (scale / divisor).to(x.dtype)
            return (z * factor if b is None else torch.addcmul(b.to(x.dtype), z, factor)), z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        x, W, b, B, A, scale, ctx.spans = inputs
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if b is None else b.dtype
        ctx.save_for_backward(x, W, B, A, scale, output[1])

    @staticmethod
    def backward(ctx: Any, gy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, W, B, A, scale, z = ctx.saved_tensors
        needs_x, _, needs_b, needs_B, needs_A, needs_scale, _ = ctx.needs_input_grad
        dtype = x.dtype
        g = gy.reshape(-1, gy.shape[-1])  # (N, out)
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        gx = gb = gB = gA = gscale = None
        with torch.autocast(x.device.type, enabled=False):
            if needs_x:
                gx = (g @ merged_weight(W, B, A, scale, dtype)).view(x.shape)
            # the thin products keep r as their first dimension: (r, N) times (N, d) runs up to eight times faster than (d, N) times (N, r)
            if needs_B:
                low = A.to(dtype) @ rows.mT  # (r, N)
                gB = torch.zeros_like(B)
                for here, ranks in ctx.spans:
                    gB[here, ranks] = (low[ranks] @ g[:, here]).mT  # (r, N)(N, out)
                if scale is not None:
                    gB = gB * scale[:, None]
            if needs_A:
                scaled = (B if scale is None else B * scale[:, None]).to(dtype)
                back = [scaled[here, ranks].mT @ g[:, here].mT for here, ranks in ctx.spans]  # (r, out)(out, N)
                products = (back[0] if len(back) == 1 else torch.cat(back)) @ rows  # (r, N)(N, in)
                if len(products) < len(A):
                    trained = torch.cat([torch.arange(ranks.start, ranks.stop, device=A.device) for _, ranks in ctx.spans])
                    gA = torch.zeros_like(A).index_copy_(0, trained, products.to(A.dtype))
                else:
                    gA = products.to(A.dtype)
            if needs_scale:
                gscale = (g * z.reshape(g.shape)).sum(0, dtype=torch.float32).to(scale.dtype) / divisor_of(scale)
            if needs_b:
                gb = g.sum(0).to(ctx.bias_dtype)
        return gx, None, gb, gB, gA, gscale, None


def divisor_of(scale: Tensor) -> Tensor:
    """The scale itself, merged into the weight before rounding and divided out for its gradient; 1 where it is too small for that."""
    return torch.where(scale.abs() > 1e-6, scale, torch.ones_like(scale))
