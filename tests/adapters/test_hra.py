"""HRA: the chain one reflection at a time, pairs that cancel, orthonormal mirrors, PEFT's layer as an oracle."""

from __future__ import annotations

import pytest
import torch
from fakes import gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.hra import HRA
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-10}


def chain(V):
    """H_1 H_2 ... H_r, one product after another."""
    H = torch.eye(V.shape[1], dtype=V.dtype)
    for v in V.detach():
        H = H @ (torch.eye(len(v), dtype=V.dtype) - 2 * torch.outer(v, v) / (v @ v))
    return H


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (4, 20)])
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_the_formula(shape, rank):
    W = weight64(*shape)
    adapter = moved(HRA(rank=rank), W)
    torch.testing.assert_close(adapter.weight(W), W @ chain(adapter.V), **EXACT)


@pytest.mark.parametrize("options", [{}, {"orthogonal": True}, {"rank": 3, "orthogonal": True}])
def test_starts_at_the_identity(options):
    W = weight64()
    torch.testing.assert_close(started(HRA(**{"rank": 4} | options), W).weight(W), W, rtol=0, atol=1e-13)


def test_equal_pairs_at_the_start():
    V = started(HRA(rank=6), weight64(30, 400)).V
    assert torch.equal(V[0::2], V[1::2])
    assert not torch.equal(V[0], V[2])
    assert 0.9 < V.abs().max() * 20 <= 1  # Kaiming: 1 / sqrt(n)


def test_the_vectors_of_a_pair_part():
    """Their first gradients are opposite, not equal: otherwise the pair would cancel for ever."""
    W = weight64()
    found = gradients(started(HRA(rank=2), W), W, weight64())["V"]
    assert found.any()
    torch.testing.assert_close(found[0], -found[1], **EXACT)


def test_lengths_of_the_vectors_do_not_matter():
    W = weight64()
    adapter = moved(HRA(rank=4), W)
    before = adapter.weight(W).detach()
    with torch.no_grad():
        adapter.V.mul_(torch.tensor([[0.1], [2.0], [-3.0], [7.0]]).double())
    torch.testing.assert_close(adapter.weight(W), before, **EXACT)


def test_gradients_against_the_chain():
    W, G = weight64(), weight64()
    adapter = moved(HRA(rank=4), W)
    found = gradients(adapter, W, G)["V"]
    V = adapter.V.detach().clone().requires_grad_()
    H = torch.eye(9, dtype=V.dtype)
    for v in V:
        H = H - 2 * (H @ v)[:, None] * v / (v @ v)
    (W @ H * G).sum().backward()
    torch.testing.assert_close(found, V.grad, **EXACT)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_orthogonal_and_low_rank_at_once(orthogonal):
    W = weight64(12, 12)
    turned = moved(HRA(rank=4, orthogonal=orthogonal), W).weight(W)
    torch.testing.assert_close(turned @ turned.mT, W @ W.mT, **EXACT)
    assert torch.linalg.matrix_rank(turned - W) == (8 if orthogonal else 4)


def test_orthonormal_mirrors():
    """W' = W H_0 H with H = I - 2 Y Y^T by Gram-Schmidt on the rows of V, written out."""
    W = weight64()
    adapter = moved(HRA(rank=3, orthogonal=True), W)
    with torch.no_grad():
        adapter.V.copy_(torch.randn(3, 9))
        adapter.Y_0.copy_(started(HRA(rank=3, orthogonal=True), W).Y_0)
    rows = []
    for v in adapter.V.detach():
        for row in rows:
            v = v - (row @ v) * row
        rows.append(v / v.norm())
    Y, Y_0, eye = torch.stack(rows), adapter.Y_0, torch.eye(9).double()
    torch.testing.assert_close(Y_0 @ Y_0.mT, torch.eye(3).double(), **EXACT)
    expected = W @ (eye - 2 * Y_0.mT @ Y_0) @ (eye - 2 * Y.mT @ Y)
    torch.testing.assert_close(adapter.weight(W), expected, **EXACT)
    form = adapter.factored(W)
    assert form.trained == 3
    assert not form.A[3:].requires_grad or not torch.autograd.grad(form.A[3:].sum(), adapter.V, allow_unused=True)[0].any()


def test_the_mirrors_of_the_start_are_saved():
    assert set(started(HRA(rank=2, orthogonal=True), weight64()).state_dict()) == {"V", "Y_0"}
    assert set(started(HRA(rank=2), weight64()).state_dict()) == {"V"}


def test_the_penalty():
    """At the start, r / 2 equal pairs: two entries of 1 off the diagonal each, if pairs are orthogonal; 0 for orthonormal mirrors."""
    adapter = started(HRA(rank=4, penalty_weight=0.5), weight64(8, 6))
    with torch.no_grad():
        adapter.V.copy_(torch.eye(6)[[0, 0, 1, 1]])
    torch.testing.assert_close(adapter.penalty(), torch.tensor(0.5 * 4, dtype=torch.float64))
    with torch.no_grad():
        adapter.V.copy_(3 * torch.eye(6)[:4])
    assert adapter.penalty() < 1e-20
    assert started(HRA(rank=4), weight64()).penalty() == 0.0


def test_the_penalty_makes_mirrors_orthogonal():
    adapter = moved(HRA(rank=4, penalty_weight=1.0), weight64())
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    first = float(adapter.penalty().detach())
    for _ in range(200):
        optimizer.zero_grad()
        adapter.penalty().backward()
        optimizer.step()
    assert float(adapter.penalty().detach()) < 1e-3 * first


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_against_the_layer_of_peft(layer):
    peft = pytest.importorskip("peft")
    build = {"linear": lambda: nn.Linear(12, 5), "conv": lambda: nn.Conv2d(3, 5, 3)}[layer]
    network, twin = nn.Sequential(build()), nn.Sequential(build())
    twin.load_state_dict(network.state_dict())
    adapter = attach(network, HRA(rank=4), "all").adapters["0"]
    theirs = peft.get_peft_model(twin, peft.HRAConfig(r=4, target_modules=["0"])).base_model.model[0]
    with torch.no_grad():
        adapter.V.normal_()
        theirs.hra_u["default"].copy_(adapter.V.mT)
    x = torch.randn(4, 12) if layer == "linear" else torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(network(x), theirs(x), rtol=1e-4, atol=1e-5)
    network(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(adapter.V.grad.mT, theirs.hra_u["default"].grad, rtol=1e-3, atol=1e-4)


def test_counts():
    """r inputs, whatever the height: 8 * 768 = 6,144."""
    assert HRA(rank=8).count(site(768, 768)) == HRA(rank=8).count(site(3072, 768)) == 6_144
    for method in (HRA(rank=4), HRA(rank=3, orthogonal=True)):
        assert trainables(method, site(8, 4, 3, 3)) == method.count(site(8, 4, 3, 3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: 0"),
        ({"rank": 3}, "rank: 3 is odd"),
        ({"penalty_weight": -1.0}, "penalty_weight: -1.0"),
        ({"penalty_weight": 1.0, "orthogonal": True}, "penalty_weight: orthogonal mirrors"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        HRA(**options)


def test_sites_that_do_not_fit():
    with pytest.raises(UserError, match=r"rank: 10 does not fit .* 9 inputs"):
        HRA(rank=10).adapter(site(12, 9), None)
    assert not HRA(rank=2).suits(site(8, 1, 1, 1, kind="conv"))
