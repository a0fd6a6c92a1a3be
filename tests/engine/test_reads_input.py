"""Layers whose output no weight can express: computed by the adapter from the layer's input, also in row slices; never merged."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Evidence, Method
from vision_peft.engine.install import activate, attach, merge
from vision_peft.errors import UserError


class Routed(Adapter):
    """y = W x + b, plus s where the first input is positive: no weight says this."""

    def __init__(self, site) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.ones(site.matrix_shape[0]))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.s.fill_(1.0)

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, W, b) + self.s * (x[..., :1] > 0)


class Routing(Method):
    """Depends on what the layer reads."""

    reads_input = True
    merge = "impossible"

    def __init__(self) -> None: ...

    def adapter(self, site, shared) -> Routed:
        return Routed(site)

    def count(self, site) -> int:
        return site.matrix_shape[0]


def test_a_layer_that_reads_its_input():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    x = torch.tensor([[1.0, 2, 3, 4], [-1, 2, 3, 4]])
    plain = net[0](x)
    attach(net, Routing(), "0")
    torch.testing.assert_close(net[0](x) - plain, torch.tensor([[1.0] * 4, [0.0] * 4]))
    with pytest.raises(UserError, match="cannot be merged"):
        merge(net)
    with pytest.raises(UserError, match="no weights to mix"):
        activate(net, {"default": 0.5})


def test_slices_that_read_their_input_keep_to_their_rows():
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2, batch_first=True)}).eval()
    x = torch.randn(2, 3, 4)
    adapters = attach(attention, Routing(), ["attn.k"])
    y = attention["attn"](x, x, x, need_weights=False)[0]
    weight, bias = attention["attn"].in_proj_weight, attention["attn"].in_proj_bias
    q, k, v = F.linear(x, weight, bias).split(4, dim=-1)
    k = k + adapters.adapters["attn/k"].s * (x[..., :1] > 0)
    heads = [each.view(2, 3, 2, 2).transpose(1, 2) for each in (q, k, v)]
    expected = attention["attn"].out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 3, 4))
    torch.testing.assert_close(y, expected)


def test_a_method_that_reads_its_input_passes_over_convolutions():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    assert [site.name for site in attach(net, Routing(), "all").sites] == ["2"]
    with pytest.raises(UserError, match="adapts weight tensors of linear and attention layers only"):
        attach(nn.Sequential(nn.Conv2d(3, 4, 1)), Routing(), "all")
