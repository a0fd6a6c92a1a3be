"""SSF: one scale for a layer, acting on its weight and on its bias; the shift on the bias."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fakes import gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.ssf import SSF
from vision_peft.engine.install import attach, installed, merge
from vision_peft.engine.store import load_adapter, save_adapter


class Block(nn.Module):
    """timm's attention has q, k and v in one weight and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(6), nn.Linear(6, 18)

    def forward(self, x):
        return self.qkv(self.norm(x))


def stirred(network, targets="all"):
    adapters = attach(network, SSF(), targets)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return adapters


def plain(network, x):
    return nn.functional.linear(x, network[0].weight, network[0].bias)


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    assert torch.equal(started(SSF(), W).weight(W), W)


def test_the_weight():
    W, G = weight64(), weight64()
    adapter = moved(SSF(), W)
    torch.testing.assert_close(adapter.weight(W), torch.diag(adapter.gamma) @ W, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(adapter, W, G)["gamma"], (G * W).sum(1), rtol=0, atol=1e-12)


def test_the_output_is_scaled_and_shifted():
    network = nn.Sequential(nn.Linear(9, 12))
    adapters = stirred(network).adapters
    x = torch.randn(5, 9)
    expected = adapters["0"].gamma * plain(network, x) + adapters["0/bias"].beta[:, 0]
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)


def test_the_scale_learns_from_weight_and_bias_together():
    """dL/dgamma = sum over inputs of g * (W x + b): half of it would come from the weight alone."""
    network = nn.Sequential(nn.Linear(9, 12))
    adapters = stirred(network).adapters
    x, G = torch.randn(5, 9), torch.randn(5, 12)
    (network(x) * G).sum().backward()
    torch.testing.assert_close(adapters["0"].gamma.grad, (G * plain(network, x)).sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapters["0/bias"].beta.grad[:, 0], G.sum(0), rtol=1e-5, atol=1e-5)


def test_a_convolution():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 5, 5)
    before = network(x)
    adapters = stirred(network).adapters
    expected = adapters["0"].gamma[:, None, None] * before + adapters["0/bias"].beta[:, :, None]
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


def test_slices_have_scales_of_their_own():
    network = Block()
    x = torch.randn(5, 6)
    normed = network.norm(x)
    before = nn.functional.linear(normed, network.qkv.weight, network.qkv.bias)
    adapters = stirred(network, ["q", "v"]).adapters
    rows = {"q": slice(0, 6), "v": slice(12, 18)}
    after = network(x)
    for name, here in rows.items():
        expected = adapters[name].gamma * before[:, here] + adapters[f"{name}/bias"].beta[:, 0]
        torch.testing.assert_close(after[:, here], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[:, 6:12], before[:, 6:12])


def test_a_bias_alone_is_shifted_only():
    network = nn.Sequential(nn.Linear(9, 12))
    x = torch.randn(5, 9)
    before = network(x)
    adapters = stirred(network, "0.bias").adapters
    assert set(adapters) == {"0/bias"}
    torch.testing.assert_close(network(x), before + adapters["0/bias"].beta[:, 0])


def test_a_weight_alone_leaves_the_bias():
    network = nn.Sequential(nn.Linear(9, 12, bias=False))
    x = torch.randn(5, 9)
    before = network(x)
    adapters = stirred(network).adapters
    assert set(adapters) == {"0"}
    torch.testing.assert_close(network(x), adapters["0"].gamma * before, rtol=1e-5, atol=1e-6)


def test_a_norm_is_shifted_only():
    network = Block()
    x = torch.randn(5, 6)
    before = network.norm(x)
    adapters = stirred(network, "norm").adapters
    torch.testing.assert_close(network.norm(x), before + adapters["norm/bias"].beta[:, 0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_reads_the_copied_scale(copied):
    network = nn.Sequential(nn.Linear(9, 12))
    stirred(network)
    twin = copied(network)
    x = torch.randn(5, 9)
    before = network(x)
    torch.testing.assert_close(twin(x), before)
    with torch.no_grad():
        installed(twin)["default"].adapters["0"].gamma.mul_(2)
    bias = installed(twin)["default"].adapters["0/bias"]
    assert bias.scales.of_layer["0"] is installed(twin)["default"].adapters["0"]
    shift = bias.beta[:, 0]
    torch.testing.assert_close(twin(x) - shift, 2 * (before - shift), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network(x), before)


def test_merged_and_saved_with_the_scale_in_the_bias(tmp_path):
    network = nn.Sequential(nn.Linear(9, 12))
    fresh = copy.deepcopy(network)
    stirred(network)
    x = torch.randn(5, 9)
    before = network(x)
    save_adapter(tmp_path / "adapter", network)
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(x), before)
    merge(network)
    torch.testing.assert_close(network(x), before, rtol=1e-5, atol=1e-5)


def test_nothing_is_saved_twice():
    adapters = attach(nn.Sequential(nn.Linear(9, 12)), SSF(), "all")
    assert set(adapters.state_dict()) == {"adapters.0.gamma", "adapters.0/bias.beta"}


def test_scales_are_not_decayed_but_shifts_are():
    adapters = stirred(nn.Sequential(nn.Linear(9, 12)))
    optimizer = torch.optim.AdamW(adapters.param_groups(0.1), lr=0.1, weight_decay=0.5)
    gamma, beta = adapters.adapters["0"].gamma, adapters.adapters["0/bias"].beta
    before = gamma.detach().clone(), beta.detach().clone()
    gamma.grad, beta.grad = torch.zeros_like(gamma), torch.zeros_like(beta)
    optimizer.step()
    assert torch.equal(gamma, before[0])
    torch.testing.assert_close(beta, before[1] * (1 - 0.1 * 0.5))


def test_counts():
    """A layer 384 wide: 384 scales and 384 shifts."""
    assert SSF().count(site(384, 1536)) + SSF().count(site(384, role="bias")) == 768
    for each in (site(12, 9), site(4, 2, 3, 3), site(10, role="bias", kind="vector")):
        assert trainables(SSF(), each) == SSF().count(each)
