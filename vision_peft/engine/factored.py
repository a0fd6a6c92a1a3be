"""y = scale * ((W + B A) x) + b in one matrix product, with gradients of B, A and scale that never form a dense weight gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_peft.engine.adapter import Factored


def factored_linear(x: Tensor, W: Tensor, b: Tensor | None, form: Factored, training: bool) -> Tensor:
    """The adapted linear map of x (..., in), W (out, in).

    Merged path: W + B A is built in float32 and rounded once to the compute type. Side path, y = W x + B (A x): for dropout,
    and where W itself is stored in half precision, since rounding W + B A onto its grid would lose small updates.
    """
    if W.dtype == torch.float32 and not (training and form.dropout > 0):
        compute = _compute_dtype(x)
        return _Merged.apply(x.to(compute), W, b, form.B, form.A, form.scale)
    return _side(x, W, b, form, training)


def stack_rows(blocks: Sequence[tuple[tuple[int, int], Factored]], rows: int) -> Factored:
    """Factored forms of disjoint row blocks (first, last + 1) of one weight with `rows` rows, as one form.

    B becomes block diagonal and the A are stacked: q, k and v of a fused projection then share every pass over x.
    """
    ordered = sorted(blocks, key=lambda block: block[0])
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
    return Factored(B, torch.cat([form.A for _, form in ordered]), scale, first.dropout)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _side(x: Tensor, W: Tensor, b: Tensor | None, form: Factored, training: bool) -> Tensor:
    dropped = F.dropout(x, form.dropout, training)
    low = F.linear(dropped, form.A.to(x.dtype))  # (..., r)
    if form.scale is None:
        return F.linear(x, W, b) + F.linear(low, form.B.to(x.dtype))
    y = (F.linear(x, W) + F.linear(low, form.B.to(x.dtype))) * form.scale.to(x.dtype)
    return y if b is None else y + b.to(y.dtype)


def _merge(W: Tensor, B: Tensor, A: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    with torch.autocast(W.device.type, enabled=False):
        merged = torch.addmm(W, B.to(W.dtype), A.to(W.dtype))
        if scale is not None:
            merged.mul_(scale[:, None])
        return merged.to(dtype)


class _Merged(torch.autograd.Function):
    """Saves x and the factors; the merged weight is rebuilt in the backward pass, which costs 2 r per weight and saves a copy of W."""

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, A: Tensor, scale: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _merge(W, B, A, scale, x.dtype), None if b is None else b.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, W, b, B, A, scale = inputs
        # the output is needed for the gradient of scale alone: x (W + B A)^T = (y - b) / scale
        ctx.save_for_backward(x, W, b, B, A, scale, output if scale is not None and scale.requires_grad else None)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, b, B, A, scale, y = ctx.saved_tensors
        needs_x, _, needs_b, needs_B, needs_A, needs_scale = ctx.needs_input_grad
        dtype = x.dtype
        g = gy.reshape(-1, gy.shape[-1])  # (N, out)
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        gx = gb = gB = gA = gscale = None
        with torch.autocast(x.device.type, enabled=False):
            if needs_x:
                gx = (g @ _merge(W, B, A, scale, dtype)).view(x.shape)
            # the thin products keep r as their first dimension: (r, N) times (N, d) runs up to eight times faster than (d, N) times (N, r)
            if needs_B:
                gB = ((A.to(dtype) @ rows.mT) @ g).mT.to(B.dtype)  # (r, N)(N, out)
                if scale is not None:
                    gB = gB * scale[:, None]
            if needs_A:
                scaled = B if scale is None else B * scale[:, None]
                gA = ((scaled.to(dtype).mT @ g.mT) @ rows).to(A.dtype)  # (r, N)(N, in)
            if needs_scale:
                gscale = _scale_gradient(g, rows, W, B, A, scale, y.reshape(g.shape), b)
            if needs_b:
                gb = g.sum(0).to(b.dtype)
        return gx, None, gb, gB, gA, gscale


def _scale_gradient(
    g: Tensor, rows: Tensor, W: Tensor, B: Tensor, A: Tensor, scale: Tensor, y: Tensor, b: Tensor | None
) -> Tensor:
    """sum over N of g * (rows (W + B A)^T), read off the output; rows of scale so small that dividing by it is unsafe are recomputed."""
    total = torch.einsum("no,no->o", g.float(), y.float())
    if b is not None:
        total = total - g.float().sum(0) * b.float()
    safe = scale.abs() > 1e-3
    gradient = total / torch.where(safe, scale, torch.ones_like(scale))
    if not bool(safe.all()):
        few = (~safe).nonzero().squeeze(1)
        merged = torch.addmm(W[few], B[few].to(W.dtype), A.to(W.dtype)).to(rows.dtype)
        gradient[few] = (g[:, few] * F.linear(rows, merged)).sum(0).float()
    return gradient.to(scale.dtype)
