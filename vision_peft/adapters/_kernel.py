"""Updates that are a kernel of two sets of points, their sparsification, and products whose dense weight is never kept.

SNELL and SNELLA build dW (m, n) from points of the outputs and of the inputs and let its entries compete; SLTrain builds it from a
thin product and a scattered vector. Dense matrices are made for the moment of a product, forward and again backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_peft.linalg.init import kaiming_rows_


def distance_kernel(P_out: Tensor, P_in: Tensor, alpha: Tensor) -> Tensor:
    """K (m, n), K_ij = sum over h of alpha_h |P_out[h, i] - P_in[h, j]|, for points P_out (h, m, d), P_in (h, n, d) and alpha (h,)."""
    return _DistanceKernel.apply(P_out, P_in, alpha)


class _DistanceKernel(torch.autograd.Function):
    """Saves the points alone. Where two points coincide, the gradient of their distance is taken as 0."""

    @staticmethod
    def forward(P_out: Tensor, P_in: Tensor, alpha: Tensor) -> Tensor:
        return torch.tensordot(alpha, _distances(P_out, P_in), 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        P_out, P_in, alpha = ctx.saved_tensors
        D = _distances(P_out, P_in)
        galpha = (D * gK).sum((1, 2)) if ctx.needs_input_grad[2] else None
        R = (gK / D.masked_fill_(D == 0, torch.inf)).mul_(alpha[:, None, None])  # (pieces, m, n)
        gout = R.sum(2)[..., None] * P_out - R @ P_in
        gin = R.sum(1)[..., None] * P_in - R.mT @ P_out
        return gout, gin, galpha


def _distances(P_out: Tensor, P_in: Tensor) -> Tensor:
    """(pieces, m, n). Without the product form: the points are close together, and K is a difference of distances."""
    return torch.cdist(P_out, P_in, compute_mode="donot_use_mm_for_euclid_dist")


def start_points_(points: Tensor, generator: torch.Generator) -> None:
    """Points (pieces, features, d) ~ U(+-1 / sqrt(features d)), Kaiming's uniform start on the three-dimensional tensor."""
    kaiming_rows_(points.view(points.shape[0], -1), generator)


@torch.no_grad()
def order_statistic(values: Tensor, position: float) -> Tensor:
    """The value at a (fractional) position, counted from 0, in ascending order, interpolated linearly: a quantile without sorting."""
    flat = values.flatten()
    below = math.floor(position)
    low = flat.kthvalue(below + 1).values
    if position == below:
        return low
    # the next one: the same value where it occurs again, else the smallest above it
    again = (flat <= low).sum() > below + 1
    high = torch.where(again, low, torch.where(flat > low, flat, torch.inf).min())
    return torch.lerp(low, high, position - below)


def recomputed_linear(x: Tensor, W: Tensor | None, b: Tensor | None, build: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """x (W + build(*tensors))^T + b for x (..., in); W None stands for zeros. Keeps x, W and the tensors: the sum is built again backward.

    `build` must be deterministic. The sum is formed in float32 and rounded once to the compute type.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _Recomputed.apply(x.to(dtype), W, b, build, *tensors)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor | None, b: Tensor | None, build: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.build, ctx.bias_dtype = build, None if b is None else b.dtype
        ctx.save_for_backward(x, W, *tensors)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _sum(W, build(*tensors)).to(x.dtype), None if b is None else b.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *tensors = ctx.saved_tensors
        needs_x, _, needs_b, _, *needed = ctx.needs_input_grad
        g, rows = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])  # (N, out), (N, in)
        gx = gb = None
        grads: list[Tensor | None] = [None] * len(tensors)
        with torch.autocast(gy.device.type, enabled=False):
            leaves = [each.detach().requires_grad_(need) for each, need in zip(tensors, needed)]
            with torch.enable_grad():
                update = ctx.build(*leaves)
            if needs_x:
                gx = (g @ _sum(W, update.detach()).to(g.dtype)).view(x.shape)
            if any(needed):
                dense = (g.mT @ rows).to(update.dtype)  # (out, in)
                found = iter(torch.autograd.grad(update, [each for each, need in zip(leaves, needed) if need], dense))
                grads = [next(found) if need else None for need in needed]
            if needs_b:
                gb = g.sum(0).to(ctx.bias_dtype)
        return gx, None, gb, None, *grads


def _sum(W: Tensor | None, update: Tensor) -> Tensor:
    return update if W is None else W.to(update.dtype) + update
