"""HiRA: the entry-wise product, what it cannot move, and the rank it can reach."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.hira import HiRA
from vision_peft.adapters.lora import LoRA
from vision_peft.engine.install import attach, merge, unmerge
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def test_starts_at_the_identity_with_the_factors_of_lora():
    W = torch.randn(12, 9)
    adapter = started(HiRA(rank=3), W)
    assert torch.equal(adapter.weight(W), W)
    assert torch.equal(adapter.A, started(LoRA(rank=3), W).A)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_formula(scale):
    W = weight64()
    adapter = moved(HiRA(rank=3, scale=scale), W)
    factors = 1 + scale * torch.einsum("ok,ki->oi", adapter.B, adapter.A)
    torch.testing.assert_close(adapter.weight(W), W * factors, **EXACT)


def test_gradients():
    """Those of LoRA under G * W: g_B = s (G * W) A^T, g_A = s B^T (G * W)."""
    W, G = weight64(), weight64()
    adapter = moved(HiRA(rank=3, scale=0.5), W)
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], 0.5 * (G * W) @ adapter.A.mT, **EXACT)
    torch.testing.assert_close(found["A"], 0.5 * adapter.B.mT @ (G * W), **EXACT)


def test_on_a_weight_of_ones_it_is_lora():
    W = torch.ones(12, 9, dtype=torch.float64)
    adapter, lora = moved(HiRA(rank=3), W), started(LoRA(rank=3, alpha=3.0), W)
    with torch.no_grad():
        lora.A.copy_(adapter.A), lora.B.copy_(adapter.B)
    torch.testing.assert_close(adapter.weight(W), lora.weight(W), **EXACT)


@pytest.mark.parametrize("of_weight, expected", [(1, 2), (2, 4), (9, 9)])
def test_the_ranks_multiply(of_weight, expected):
    W = torch.randn(12, of_weight).double() @ torch.randn(of_weight, 9).double()
    assert torch.linalg.matrix_rank(delta(moved(HiRA(rank=2), W), W)) == expected


def test_zeros_stay_zero():
    W = weight64()
    W[W.abs() < 0.3] = 0
    W[4] = 0
    adapted = moved(HiRA(rank=3), W).weight(W)
    assert torch.equal(adapted == 0, W == 0)


def test_merging_a_factor_of_zero_can_be_undone():
    """Where 1 + s B A = 0 the merged entry is lost: the frozen weight must come back all the same."""
    network = nn.Sequential(nn.Linear(4, 3))
    frozen = network[0].weight.detach().clone()
    adapter = attach(network, HiRA(rank=1), "all").adapters["0"]
    with torch.no_grad():
        adapter.A.fill_(1.0), adapter.B.fill_(-1.0)
    merge(network)
    assert not network[0].weight.any()
    unmerge(network)
    assert torch.equal(network[0].weight, frozen)


def test_counts():
    """12,288 for 768 x 768 at r = 8, as LoRA."""
    assert HiRA(rank=8).count(site(768, 768)) == 12_288
    assert count(HiRA(rank=2), clip_vit_b16()) == 184_320
    assert trainables(HiRA(rank=3), site(4, 2, 3, 3)) == HiRA(rank=3).count(site(4, 2, 3, 3)) == 66


def test_against_the_layer_of_peft():
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(7, 5))
    adapter = attach(network, HiRA(rank=2), "all").adapters["0"]
    with torch.no_grad():
        adapter.B.normal_()
    twin = nn.Sequential(nn.Linear(7, 5))
    twin.load_state_dict(network.state_dict())
    twin = peft.get_peft_model(twin, peft.HiraConfig(r=2, target_modules=["0"]))
    layer = twin.base_model.model[0]
    layer.hira_A["default"].data.copy_(adapter.A.data)
    layer.hira_B["default"].data.copy_(adapter.B.data)
    x, G = torch.randn(4, 7), torch.randn(4, 5)
    ours, theirs = network(x), twin(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    (ours * G).sum().backward()
    (theirs * G).sum().backward()
    torch.testing.assert_close(adapter.A.grad, layer.hira_A["default"].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.B.grad, layer.hira_B["default"].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, -2])
def test_bad_options(rank):
    with pytest.raises(UserError, match=f"adapter.method.rank: {rank} is not positive"):
        HiRA(rank=rank)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        HiRA(rank=10).adapter(site(12, 9), None)
