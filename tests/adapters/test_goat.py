"""GOAT: segments of the spectrum, the mean taken away, routing token by token."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from fakes import site
from torch import nn

from vision_peft.adapters.goat import GOAT
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.install import attach, merge
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError


def adapted(move=True, **options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(9, 12))
    adapters = attach(network, GOAT(**{"rank": 6, "experts": 3, "top_k": 2} | options), "all")
    with torch.no_grad():
        for parameter in adapters.parameters() if move else ():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network, adapters.adapters["0"]


def started(W, **options):
    adapter = GOAT(**{"rank": 6, "experts": 3} | options).adapter(site(*W.shape), None).to(W.dtype)
    with torch.no_grad():
        adapter.initialize(W, Evidence(torch.Generator().manual_seed(0)))
    return adapter


def segments(W, experts, width):
    """Parts of W that experts start from: `width` triplets from the start of each segment."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    t = len(S) // experts
    return [(U[:, j * t : j * t + width] * S[j * t : j * t + width]) @ Vh[j * t : j * t + width] for j in range(experts)]


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (14, 13)])
@pytest.mark.parametrize("options", [{}, {"alpha": 12.0, "rho": 4.0}, {"eta": 2.0}])
def test_experts_start_as_parts_of_the_weight(shape, options):
    W = torch.randn(*shape, dtype=torch.float64)
    adapter = started(W, **options)
    for j, part in enumerate(segments(W, 3, 2)):
        here = slice(2 * j, 2 * j + 2)
        start = adapter.scale * adapter.B[:, here] @ adapter.A[here]
        torch.testing.assert_close(start, part / options.get("rho", 10.0), rtol=0, atol=1e-11)


def test_the_two_factors_have_the_same_size():
    adapter = started(torch.randn(12, 9, dtype=torch.float64))
    torch.testing.assert_close(adapter.B.norm(dim=0), adapter.A.norm(dim=1))


def test_scale():
    assert GOAT(rank=8, eta=1.0).scale(384) == math.sqrt(3 * 384 / 8) == 12.0
    assert GOAT(rank=8, eta=4.0).scale(384) == 24.0
    assert GOAT(rank=8, alpha=16.0).scale(384) == 2.0


def test_the_mean_of_the_experts_is_the_frozen_layer():
    """With a router that does not choose, all gates are 1 / E: the offset is taken away exactly."""
    network, adapter = adapted(move=False, top_k=3)
    x = torch.randn(5, 9)
    frozen = x @ network[0].weight.mT + network[0].bias
    assert (network(x) - frozen).abs().max() > 1e-4
    with torch.no_grad():
        adapter.R.zero_()
    torch.testing.assert_close(network(x), frozen, rtol=1e-5, atol=1e-6)


def test_one_expert_starts_at_the_identity():
    network, _ = adapted(move=False, rank=2, experts=1, top_k=1)
    x = torch.randn(5, 9)
    torch.testing.assert_close(network(x), x @ network[0].weight.mT + network[0].bias, rtol=1e-6, atol=1e-6)


def test_token_by_token():
    network, adapter = adapted()
    W, s, d = network[0].weight, adapter.scale, adapter.width
    mean = sum(segments(W.double(), 3, 2)).float() / 10 / 3
    x = torch.randn(2, 4, 9)
    y = network(x)
    for token, output in zip(x.view(-1, 9), y.view(-1, 12)):
        logits = adapter.R @ token
        best = logits.argsort(descending=True)[:2]
        gates = logits[best].softmax(0)
        expected = (W - mean) @ token + network[0].bias
        for gate, j in zip(gates, best.tolist()):
            expected = expected + s * gate * adapter.B[:, d * j : d * j + d] @ (adapter.A[d * j : d * j + d] @ token)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_what_is_subtracted_is_not_trained_and_not_saved():
    network, adapter = adapted()
    assert {name for name, _ in adapter.named_parameters()} == {"A", "B", "R"} == set(adapter.state_dict())
    before = adapter.A0.clone(), adapter.B0.clone()
    network(torch.randn(5, 9)).square().sum().backward()
    assert not adapter.A0.requires_grad
    torch.optim.AdamW(adapter.parameters(), lr=0.1).step()
    assert torch.equal(adapter.A0, before[0])
    assert torch.equal(adapter.B0, before[1])


def test_everything_learns_in_the_first_step():
    network, adapter = adapted(move=False)
    network(torch.randn(30, 9)).square().sum().backward()
    assert all(p.grad.any() for p in adapter.parameters())


def test_the_balance_loss():
    network, adapter = adapted(balance=0.5)
    x = torch.randn(20, 9)
    network(x)
    loss = adapter.penalty()
    logits = x @ adapter.R.mT
    f = torch.bincount(logits.topk(2).indices.flatten(), minlength=3) / 40
    expected = 0.5 * 3 * (f * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, adapter.R)[0] for each in (loss, expected)), rtol=1e-4, atol=1e-7)


def test_saved_and_loaded(tmp_path):
    network, _ = adapted()
    fresh = nn.Sequential(nn.Linear(9, 12))
    fresh.load_state_dict(network.state_dict())
    save_adapter(tmp_path / "adapter", network)
    load_adapter(fresh, tmp_path / "adapter")
    x = torch.randn(5, 9)
    torch.testing.assert_close(fresh(x), network(x))
    torch.testing.assert_close(copy.deepcopy(network)(x), network(x))


def test_the_mark_tells_other_segments():
    W = torch.randn(12, 9, dtype=torch.float64)
    mark = started(W).fingerprint()
    torch.testing.assert_close(started(W.clone()).fingerprint(), mark)
    assert not torch.allclose(started(W, rho=5.0).fingerprint(), mark, rtol=1e-3)
    assert not torch.allclose(started(W.flip(0)).fingerprint(), mark, rtol=1e-3)


def test_it_cannot_be_merged():
    with pytest.raises(UserError, match="cannot be merged"):
        merge(adapted()[0])


def test_counts():
    """768 x 768, r = 8, E = 8: LoRA's 12,288 and a router of 6,144."""
    assert GOAT().count(site(768, 768)) == 12_288 + 6_144
    for method in (GOAT(rank=6, experts=3), GOAT(rank=4, experts=1, top_k=1)):
        assert sum(p.numel() for p in method.adapter(site(12, 9), None).parameters()) == method.count(site(12, 9))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 6}, "rank: 6 is not a multiple of the 8 experts"),
        ({"rank": 0}, "rank: 0"),
        ({"rho": 0.0}, "rho: 0.0 is not positive"),
        ({"eta": -1.0}, "eta: -1.0 is not positive"),
        ({"alpha": 0.0}, "alpha: 0.0 is not positive"),
        ({"top_k": 1}, "top_k: 1"),
        ({"balance": -1.0}, "balance: -1.0"),
        ({"dropout": 1.0}, "dropout"),
        ({"experts": 0}, "experts: 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        GOAT(**options)


def test_segments_too_short():
    with pytest.raises(UserError, match="rank: 12 does not fit vision"):
        GOAT(rank=12, experts=3).adapter(site(12, 9), None)
