"""DoRA: lengths and directions apart, the norm held constant in the backward pass."""

from __future__ import annotations

import pytest
import torch
from fakes import gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.dora import DoRA
from vision_peft.engine.install import attach
from vision_peft.errors import UserError


def direction(adapter, W):
    return (W + adapter.scale * adapter.B @ adapter.A).detach()


def test_starts_at_the_identity():
    W = weight64()
    adapter = started(DoRA(rank=3), W)
    torch.testing.assert_close(adapter.magnitude, W.norm(dim=1), rtol=1e-14, atol=0)
    torch.testing.assert_close(adapter.weight(W), W, rtol=1e-14, atol=0)


def test_the_formula():
    W = weight64()
    adapter = moved(DoRA(rank=3, alpha=2.0), W)
    V = W + 2 / 3 * adapter.B @ adapter.A
    expected = adapter.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
    torch.testing.assert_close(adapter.weight(W), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(adapter.weight(W).norm(dim=1), adapter.magnitude.abs(), rtol=1e-11, atol=0)


def test_gradients_with_the_norm_held_constant():
    """dL/dmu = rowwise <G, V / |V|>; A and B as LoRA under diag(mu / |V|)."""
    W, G = weight64(), weight64()
    adapter = moved(DoRA(rank=3, alpha=3.0), W)
    found = gradients(adapter, W, G)
    V = direction(adapter, W)
    nu = V.norm(dim=1, keepdim=True)
    scaled = (adapter.magnitude.detach()[:, None] / nu) * G
    torch.testing.assert_close(found["magnitude"], (G * V / nu).sum(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["B"], scaled @ adapter.A.mT, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["A"], adapter.B.mT @ scaled, rtol=1e-10, atol=1e-12)


def test_scaling_weight_and_b_together_leaves_the_output_alone():
    W = weight64()
    adapter = moved(DoRA(rank=3), W)
    before = adapter.weight(W).detach()
    with torch.no_grad():
        adapter.B.mul_(7.5)
    torch.testing.assert_close(adapter.weight(7.5 * W), before, rtol=1e-10, atol=1e-12)


def test_a_rank_of_one_row_only_moves_that_row():
    W = weight64()
    adapter = started(DoRA(rank=2), W)
    with torch.no_grad():
        adapter.B[4] = 1.0
    changed = (adapter.weight(W) - W).abs().amax(1) > 1e-12
    assert changed.nonzero().flatten().tolist() == [4]


def test_zero_rows_stay_zero_and_do_not_explode_while_training():
    """A layer that starts at zero, as the last one of a residual branch may: with a bias, and three real steps."""
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    with torch.no_grad():
        network[2].weight.zero_()
        network[0].weight[3].zero_()
    adapters = attach(network, DoRA(rank=2), "all")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    x, target = torch.randn(32, 6), torch.randn(32, 4)
    for _ in range(3):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        assert all(p.grad.abs().max() < 10 for p in adapters.parameters())
        optimizer.step()
    zero = adapters.adapters["2"].weight(network[2].weight)
    assert zero.isfinite().all()
    assert zero.abs().max() < 0.1


def test_against_the_layer_of_peft():
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(7, 5))
    adapter = attach(network, DoRA(rank=2, alpha=3.0), "all").adapters["0"]
    with torch.no_grad():
        adapter.B.normal_()
        adapter.magnitude.mul_(torch.rand(5) + 0.5)
    twin = nn.Sequential(nn.Linear(7, 5))
    twin.load_state_dict(network.state_dict())
    twin = peft.get_peft_model(twin, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True))
    layer = twin.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(adapter.A.data)
    layer.lora_B["default"].weight.data.copy_(adapter.B.data)
    layer.lora_magnitude_vector["default"].weight.data.copy_(adapter.magnitude.data)
    x, G = torch.randn(4, 7), torch.randn(4, 5)
    ours, theirs = network(x), twin(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    (ours * G).sum().backward()
    (theirs * G).sum().backward()
    torch.testing.assert_close(adapter.magnitude.grad, layer.lora_magnitude_vector["default"].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.A.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.B.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-5)


def test_counts():
    """768 x 768 at r = 8: 13,056."""
    assert DoRA(rank=8).count(site(768, 768)) == 13_056
    for shape in ((12, 9), (4, 2, 3, 3)):
        assert trainables(DoRA(rank=3), site(*shape)) == DoRA(rank=3).count(site(*shape))


def test_bad_options():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        DoRA(rank=10).adapter(site(12, 9), None)
    with pytest.raises(UserError, match="scaling"):
        DoRA(scaling="none")
    with pytest.raises(UserError, match="dropout"):
        DoRA(dropout=2.0)
