"""factored_conv against autograd of the plain formula in float64, by each of its ways."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.adapters.dora import DoRA
from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.ssf import SSF
from vision_peft.engine import factored_conv as module
from vision_peft.engine.adapter import Factored
from vision_peft.engine.factored_conv import WIDE, Geometry, factored_conv
from vision_peft.engine.install import attach, merge
from vision_peft.engine.readers import ConvReader

RANK, IN = 2, 3
LAYERS = {
    "plain": nn.Conv2d(IN, WIDE * RANK, 3, padding=1),
    "strided": nn.Conv2d(IN, WIDE * RANK, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False),
}


@pytest.fixture(params=["merged", "side", "dense"])
def way(request, monkeypatch):
    monkeypatch.setattr(module, "MANY", 0 if request.param == "merged" else 10**6)
    monkeypatch.setattr(module, "WIDE", 10**6 if request.param == "dense" else WIDE)


def outcome(function, x: Tensor, layer: nn.Conv2d, form: Factored, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of x, bias, B, A and scale."""
    leaves = [x, layer.bias, form.B, form.A, form.scale]
    leaves = [None if each is None else each.detach().to(dtype).requires_grad_() for each in leaves]
    y = function(leaves[0], layer.weight.detach(), leaves[1], Factored(*leaves[2:]), Geometry.of(layer))
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad((y * direction).sum(), [each for each in leaves if each is not None])]


def plain(x: Tensor, W: Tensor, b: Tensor | None, form: Factored, geometry: Geometry) -> Tensor:
    kernel = (W.double() + (form.B @ form.A).view_as(W)) * (1 if form.scale is None else form.scale[:, None, None, None])
    return F.conv2d(x, kernel, b, *geometry)


def drawn(layer: nn.Conv2d, scale: bool) -> tuple[Tensor, Factored]:
    torch.manual_seed(0)
    out, size = len(layer.weight), layer.weight[0].numel()
    return torch.randn(4, IN, 6, 7), Factored(torch.randn(out, RANK), torch.randn(RANK, size), torch.rand(out) + 0.5 if scale else None)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients(name, scale, way):
    x, form = drawn(LAYERS[name], scale)
    expected = outcome(plain, x, LAYERS[name], form, torch.float64)
    for found, each in zip(outcome(factored_conv, x, LAYERS[name], form, torch.float32), expected, strict=True):
        torch.testing.assert_close(found.double(), each, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_under_autocast(name, way):
    x, form = drawn(LAYERS[name], True)
    expected = outcome(plain, x, LAYERS[name], form, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours = outcome(factored_conv, x, LAYERS[name], form, torch.float32)
    assert ours[0].dtype == torch.bfloat16 and all(each.dtype == torch.float32 for each in ours[1:])
    for found, each in zip(ours, expected, strict=True):
        assert (found.double() - each).norm() < 0.02 * each.norm()


def test_merged_only_leading_ranks_are_trained(monkeypatch):
    monkeypatch.setattr(module, "MANY", 0)
    layer = LAYERS["plain"]
    x, form = drawn(layer, True)
    B, A = form.B.requires_grad_(), form.A.requires_grad_()
    gradients = []
    for trained in (None, 1):
        y = factored_conv(x, layer.weight.detach(), None, Factored(B, A, form.scale, trained=trained), Geometry.of(layer))
        gradients.append(torch.autograd.grad(y.square().sum(), (B, A)))
    whole, leading = gradients
    torch.testing.assert_close(leading[0][:, :1], whole[0][:, :1], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(leading[1][:1], whole[1][:1], rtol=1e-4, atol=1e-3)
    assert not leading[0][:, 1:].any() and not leading[1][1:].any()


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2), SSF()])
def test_a_network_of_convolutions(method, way):
    """Wide enough for this way, too narrow, and with a geometry that it does not take."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 16, 3, groups=2))
    x = torch.randn(2, 3, 8, 8)
    adapters = attach(network, method, ["0", "2", "3"])
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.1)
    readers = [type(network[index].forward.reader) is ConvReader for index in (0, 2, 3)]
    assert readers == [True, True, False]
    found = network(x)
    merge(network)
    torch.testing.assert_close(found, network(x), rtol=1e-4, atol=1e-5)
