"""Tied-LoRA: one trained pair, two vectors a layer."""

from __future__ import annotations

import copy

import pytest
import torch
from fakes import site
from torch import nn

from vision_peft.adapters.tied_lora import TiedLoRA
from vision_peft.adapters.vera import VeRA
from vision_peft.engine.install import attach, installed
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 15))


def adapted(**options):
    net = network()
    adapters = attach(net, TiedLoRA(rank=3, **options), "all", seed=3)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    return net, adapters


def test_starts_at_the_identity():
    net = network()
    x = torch.randn(4, 12)
    before = net(x)
    adapters = attach(net, TiedLoRA(rank=3), "all")
    assert torch.equal(net(x), before)
    assert not adapters.shared.B.any()
    assert all(torch.equal(vector, torch.ones_like(vector)) for vector in adapters.adapters.parameters())


@pytest.mark.parametrize("name", ["0", "2"])
def test_the_formula(name):
    net, adapters = adapted(alpha=2.0)
    W, own, shared = net[int(name)].weight.double(), adapters.adapters[name].double(), adapters.shared.double()
    expected = torch.diag(own.v) @ shared.B[: W.shape[0]] @ torch.diag(own.u) @ shared.A[:, : W.shape[1]]
    torch.testing.assert_close(own.weight(W) - W, 2 / 3 * expected, rtol=1e-10, atol=1e-12)


def test_gradients_by_hand():
    """dv = s rowwise <G A^T, B diag(u)>, du = s columnwise <G A^T, diag(v) B>; A and B sum over the layers."""
    net, adapters = adapted(alpha=3.0)
    shared, G = adapters.shared, {name: torch.randn_like(net[int(name)].weight) for name in ("0", "2")}
    sum((adapters.adapters[name].weight(net[int(name)].weight) * G[name]).sum() for name in G).backward()
    gA, gB = torch.zeros_like(shared.A), torch.zeros_like(shared.B)
    for name, g in G.items():
        own, (rows, columns) = adapters.adapters[name], g.shape
        A, B, u, v = shared.A.detach()[:, :columns], shared.B.detach()[:rows], own.u.detach(), own.v.detach()
        low = g @ A.mT  # (rows, r)
        torch.testing.assert_close(own.v.grad, (low * B * u).sum(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.u.grad, (low * v[:, None] * B).sum(0), rtol=1e-4, atol=1e-4)
        gB[:rows] += v[:, None] * low * u
        gA[:, :columns] += (v[:, None] * B * u).mT @ g
    torch.testing.assert_close(shared.A.grad, gA, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shared.B.grad, gB, rtol=1e-4, atol=1e-4)


def test_it_is_vera_with_a_trained_pair():
    """VeRA's layer with the same pair and vectors is the same map, but for the scale, which VeRA has not."""
    net, adapters = adapted(alpha=3.0)
    twin = network()
    vera = attach(twin, VeRA(rank=3), "all")
    with torch.no_grad():
        vera.shared.A.copy_(adapters.shared.A)
        vera.shared.B.copy_(adapters.shared.B)
        for name, own in adapters.adapters.items():
            vera.adapters[name].b.copy_(own.v)
            vera.adapters[name].d.copy_(own.u)
    x = torch.randn(4, 12)
    torch.testing.assert_close(net(x), twin(x), rtol=1e-4, atol=1e-4)


def test_one_step_moves_the_pair_two_move_everything():
    net = network()
    adapters = attach(net, TiedLoRA(rank=3), "all")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0)
    x, target = torch.randn(32, 12), torch.randn(32, 15)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        (net(x) - target).square().mean().backward()
        moved.append({name for name, p in adapters.named_parameters() if p.grad.any()})
        optimizer.step()
    assert moved[0] == {"shared.B"}
    assert moved[1] == {name for name, _ in adapters.named_parameters()}


def test_saved_once_and_copied_together(tmp_path):
    net, adapters = adapted()
    vectors = {f"adapters.{name}.{vector}" for name in ("0", "2") for vector in "uv"}
    assert set(adapters.state_dict()) == {"shared.A", "shared.B", *vectors}
    x = torch.randn(4, 12)
    before = net(x)
    save_adapter(tmp_path / "adapter", net)
    fresh = network()
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(x), before)
    twin = installed(copy.deepcopy(net))["default"]
    assert twin.adapters["0"].shared is twin.shared is twin.adapters["2"].shared


def test_counts():
    """768 x 768 at r = 8: 776 a weight, and one pair of 12,288."""
    sites = [site(768, 768, name=f"vision.{i}.attn.q") for i in range(12)]
    method = TiedLoRA(rank=8)
    shared = method.shared(sites)
    assert method.count(sites[0]) == 776
    assert sum(p.numel() for p in shared.parameters()) == 12_288
    assert sum(p.numel() for p in method.adapter(sites[0], shared).parameters()) == 776


@pytest.mark.parametrize("options, message", [({"rank": 0}, "rank: 0"), ({"dropout": -0.1}, "dropout"), ({"scaling": "no"}, "scaling")])
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        TiedLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        attach(network(), TiedLoRA(rank=10), "all")
