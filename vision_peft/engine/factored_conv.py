"""y = scale * conv(x, W + B A) + b, B (out, r), A (r, in, h, w), by whichever of three ways takes least time.

Merged, where the kernel moves over many places: one convolution with W + B A, without a dense weight gradient. low = conv(x, A) has r
channels, and of y's gradient g

    gB = g low^T over pictures and places,      gA = the weight gradient of conv(x, A) for B^T g

Side, over few places, where building W + B A forward and backward would take longer than convolving: y = conv(x, W) + B conv(x, A).
Dense, where r is not small against `out`: convolutions of r channels then take longer than the dense gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Factored
from vision_peft.engine.factored import compute_dtype, divisor_of, merged_weight

# on a CPU, r = 8: 24 channels of 64 x 64 5.3 ms by thin convolutions, 3.5 by the dense gradient; 48 as long; 320 of 32 x 32 2.8 and 21
WIDE = 6  # channels, a rank
# building a kernel twice takes 2 out (r + m) a column of it, the thin gradient of x r a place; m, of memory, is about r for r = 8
MANY = 4  # places, an output channel


class Geometry(NamedTuple):
    """How a kernel moves over its input; a number a dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Conv2d) -> Geometry | None:
        """None where more is needed than numbers: groups, `same`, reflected edges."""
        if module.groups > 1 or isinstance(module.padding, str) or module.padding_mode != "zeros":
            return None
        return cls(module.stride, module.padding, module.dilation)

    def convolve(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return torch.convolution(x, W, b, *self, False, [0] * len(self.stride), 1)

    def gradients(self, g: Tensor, x: Tensor, W: Tensor, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of input, weight and bias, those that are wanted, for g, the output's."""
        return torch.ops.aten.convolution_backward(g, x, W, None, *self, False, [0] * len(self.stride), 1, wanted)


def factored_conv(x: Tensor, W: Tensor, b: Tensor | None, form: Factored, geometry: Geometry) -> Tensor:
    """The adapted convolution of x (batch, in, H, W), W (out, in, h, w) in float32; dropout of the form is not applied."""
    x = x.to(compute_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        if form.B.shape[1] * WIDE > len(W):
            return _dense(x, W, b, form, geometry)
        places = x[:, 0].numel() // math.prod(geometry.stride)
        if places < MANY * len(W) or not len(form.A):  # no branch at all: only scaled
            return _side(x, W, b, form, geometry)
        trained = form.B.shape[1] if form.trained is None else form.trained
        if form.scale is None or not form.scale.requires_grad:
            return _MergedConv.apply(x, W, b, form.B, form.A, form.scale, geometry, trained)
        divisor = divisor_of(form.scale.detach())
        return _scaled(_MergedConv.apply(x, W, None, form.B, form.A, divisor, geometry, trained), form.scale / divisor, b)


def _dense(x: Tensor, W: Tensor, b: Tensor | None, form: Factored, geometry: Geometry) -> Tensor:
    kernel = torch.addmm(W.flatten(1), form.B, form.A)
    kernel = kernel if form.scale is None else form.scale[:, None] * kernel
    return geometry.convolve(x, kernel.view_as(W).to(x.dtype), None if b is None else b.to(x.dtype))


def _side(x: Tensor, W: Tensor, b: Tensor | None, form: Factored, geometry: Geometry) -> Tensor:
    y = geometry.convolve(x, W.to(x.dtype), None if b is None or form.scale is not None else b.to(x.dtype))
    if len(form.A):
        low = geometry.convolve(x, form.A.view(-1, *W.shape[1:]).to(x.dtype))
        y = torch.baddbmm(y.flatten(2), form.B.to(x.dtype).expand(len(x), -1, -1), low.flatten(2)).view_as(y)
    return y if form.scale is None else _scaled(y, form.scale, b)


def _scaled(y: Tensor, scale: Tensor, b: Tensor | None) -> Tensor:
    """In float32: a scale near 1 rounded to half precision is 1."""
    z = y * scale[:, None, None]
    return (z if b is None else z + b[:, None, None]).to(y.dtype)


class _MergedConv(torch.autograd.Function):
    """Saves x and the factors; the merged kernel is built anew in the backward pass."""

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, A: Tensor, scale: Tensor | None, geometry: Geometry, trained: int
    ) -> Tensor:
        return geometry.convolve(x, _kernel(W, B, A, scale, x.dtype), None if b is None else b.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, W, b, B, A, scale, ctx.geometry, ctx.trained = inputs
        ctx.bias_dtype = None if b is None else b.dtype
        ctx.save_for_backward(x, W, B, A, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, B, A, scale = ctx.saved_tensors
        needs_x, _, needs_b, needs_B, needs_A, *_ = ctx.needs_input_grad
        geometry, leading = ctx.geometry, slice(ctx.trained)
        gx = gb = gB = gA = None
        with torch.autocast(x.device.type, enabled=False):
            if needs_x:
                gx = geometry.gradients(g, x, _kernel(W, B, A, scale, x.dtype), [True, False, False])[0]
            rows = g.flatten(2)  # (batch, out, places)
            thin = A[leading].view(ctx.trained, *W.shape[1:]).to(x.dtype)
            if needs_B:
                low = geometry.convolve(x, thin).flatten(2)  # (batch, r, places)
                gB = torch.zeros_like(B)
                gB[:, leading] = (rows @ low.mT).sum(0, dtype=torch.float32).to(B.dtype)
                if scale is not None:
                    gB = gB * scale[:, None]
            if needs_A:
                scaled = (B if scale is None else B * scale[:, None])[:, leading].to(x.dtype)
                back = (scaled.mT @ rows).view(len(x), -1, *g.shape[2:])  # (batch, r, H, W)
                gA = torch.zeros_like(A)
                gA[leading] = geometry.gradients(back, x, thin, [False, True, False])[1].flatten(1).to(A.dtype)
            if needs_b:
                gb = rows.sum((0, 2)).to(ctx.bias_dtype)
        return gx, None, gb, gB, gA, None, None, None


def _kernel(W: Tensor, B: Tensor, A: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return merged_weight(W.flatten(1), B, A, scale, dtype).view_as(W)
