"""SoKA: Kronecker terms one by one, rank rules on spectra with known answers, re-selection that leaves the function alone."""

from __future__ import annotations

import copy

import pytest
import torch
from fakes import gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.soka import SoKA, elbow_rank
from vision_peft.engine.adapter import Clock, Evidence
from vision_peft.engine.install import attach
from vision_peft.errors import UserError
from vision_peft.linalg.kronecker import Split, kronecker_svd

EXACT = {"rtol": 0, "atol": 1e-10}


def kron_sum(A, B):
    return sum(torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(A.detach(), B.detach()))


@pytest.mark.parametrize("shape", [(12, 9), (8, 36), (7, 5), (20, 12)])
@pytest.mark.parametrize("train_sigma", [False, True])
def test_the_formula(shape, train_sigma):
    W = weight64(*shape)
    method = SoKA(rank=1 if shape == (7, 5) else 3, train_sigma=train_sigma)
    start, adapter = started(method, W), moved(method, W)
    scale = adapter.sigma[:, None, None] if train_sigma else 1
    first = start.sigma[:, None, None] if train_sigma else 1
    residual = W - kron_sum(first * start.A, start.B)
    torch.testing.assert_close(adapter.weight(W), residual + kron_sum(scale * adapter.A, adapter.B), **EXACT)


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    for method in (SoKA(), SoKA(rank=3), SoKA(rank=2, train_sigma=True)):
        assert torch.equal(started(method, W).weight(W), W)


def test_the_start_is_the_best_sum_and_balanced():
    """||W_res||^2 is the sum of the squared values left out."""
    W = weight64()
    adapter = started(SoKA(rank=3), W)
    _, S, _ = kronecker_svd(W, Split(3, 3, 4, 3))
    residual = W - kron_sum(adapter.A, adapter.B)
    torch.testing.assert_close(residual.square().sum(), S[3:].square().sum(), rtol=1e-10, atol=0)
    torch.testing.assert_close(adapter.A.flatten(1).norm(dim=1), S[:3].sqrt(), **EXACT)
    torch.testing.assert_close(adapter.B.flatten(1).norm(dim=1), S[:3].sqrt(), **EXACT)


def test_one_term_can_change_the_full_rank():
    W = weight64(12, 12)
    adapter = moved(SoKA(rank=1), W)
    assert torch.linalg.matrix_rank(kron_sum(adapter.A, adapter.B)) == 12


def test_gradients():
    """dA_k[i, j] = <G_ij, B_k> over the blocks G_ij of G; dB_k = sum A_k[i, j] G_ij."""
    W, G = weight64(), weight64()
    adapter = moved(SoKA(rank=2), W)
    found = gradients(adapter, W, G)
    blocks = G.reshape(3, 4, 3, 3).transpose(1, 2)
    torch.testing.assert_close(found["A"], torch.einsum("ijab,kab->kij", blocks, adapter.B.detach()), **EXACT)
    torch.testing.assert_close(found["B"], torch.einsum("ijab,kij->kab", blocks, adapter.A.detach()), **EXACT)


# ---- the rank ----


@pytest.mark.parametrize(
    "S, options, r",
    [
        ([3.0, 2, 1], {"selection": "energy", "energy": 0.64}, 1),
        ([3.0, 2, 1], {"selection": "energy", "energy": 0.9}, 2),
        ([3.0, 2, 1], {"selection": "energy", "energy": 1.0}, 3),
        ([10.0, 9, 1, 0.9, 0.8], {"selection": "elbow"}, 2),
        ([10.0, 1, 0.9, 0.8], {"selection": "elbow"}, 1),
        ([1.0, 1, 1, 1], {"selection": "elbow"}, 1),
        ([2.0, 1], {"selection": "elbow"}, 1),
        ([10.0, 9, 8, 2, 1.5, 1.2], {"selection": "elbow", "elbow": "second_difference"}, 3),
        ([10.0, 9, 1, 0.9, 0.8], {"selection": "both", "energy": 0.5}, 1),
        ([10.0, 9, 1, 0.9, 0.8], {"selection": "both", "energy": 0.999}, 2),
        ([10.0, 9, 8, 7, 6, 5], {"selection": "energy", "max_rank": 2}, 2),
        ([10.0, 9, 1, 0.9, 0.8], {"rank": 4}, 4),
        ([0.0, 0, 0, 0], {}, 1),
    ],
)
def test_choice_of_the_rank(S, options, r):
    assert SoKA(**options).choose(torch.tensor(S)) == r


def test_the_energy_rule_is_monotone():
    S = torch.randn(50).abs().sort(descending=True).values
    ranks = [SoKA(selection="energy", energy=eta / 20, max_rank=50).choose(S) for eta in range(1, 21)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1] == 50


def test_the_elbow_does_not_depend_on_the_scale():
    S = torch.logspace(1, -2, 30)
    assert elbow_rank(S, "chord") == elbow_rank(1000 * S, "chord")
    assert elbow_rank(S, "second_difference") == elbow_rank(1000 * S, "second_difference")


def test_shapes_follow_the_weight():
    split = Split(3, 3, 4, 3)
    U = torch.linalg.qr(torch.randn(9, 9))[0].reshape(9, 3, 3)
    V = torch.linalg.qr(torch.randn(12, 9))[0].mT.reshape(9, 4, 3)
    W = kron_sum(torch.tensor([9, 8, 7, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])[:, None, None] * U, V)
    adapter = started(SoKA(), W)
    assert adapter.A.shape == (3, 3, 3)
    assert adapter.B.shape == (3, split.m2, split.n2)


# ---- re-selection ----


def reselecting(W, **options):
    adapter = started(SoKA(rank=3, reselect_every=2, **options), W)
    with torch.no_grad():
        adapter.A[1].mul_(0.01)  # its energy is now next to nothing
    return adapter


def step(adapter, number):
    adapter.method.coordinate({"q": adapter}, None, Clock(number, 100, 0))


def test_a_term_without_energy_is_fixed_and_the_function_stays():
    W = weight64()
    adapter = reselecting(W, energy=0.9)
    before = adapter.weight(W).detach()
    with torch.no_grad():
        step(adapter, 3)
        assert adapter.active.all(), "not a step of re-selection"
        step(adapter, 4)
    assert not adapter.active[1]
    assert torch.equal(adapter.weight(W), before)


def test_a_fixed_term_cannot_move():
    W, G = weight64(), weight64()
    adapter = reselecting(W)
    with torch.no_grad():
        step(adapter, 2)
    before = adapter.weight(W).detach()
    found = gradients(adapter, W, G)
    assert not found["A"][1].any()
    assert found["A"][0].any()
    with torch.no_grad():
        adapter.A[1].add_(5.0)  # as momentum would
        adapter.B[1].add_(5.0)
    assert torch.equal(adapter.weight(W), before)


def test_a_steady_spectrum_loses_no_more_terms():
    adapter = reselecting(weight64())
    with torch.no_grad():
        step(adapter, 2)
        once = adapter.active.clone()
        step(adapter, 4)
    assert torch.equal(adapter.active, once)
    assert once.any()


def test_re_selection_survives_a_state_dict():
    W = weight64()
    adapter = reselecting(W)
    with torch.no_grad():
        step(adapter, 2)
    other = started(SoKA(rank=3, reselect_every=2), W)
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other.weight(W), adapter.weight(W))
    assert torch.equal(other.active, adapter.active)


# ---- the start from a gradient ----


def test_start_from_a_gradient():
    W, G = weight64(), weight64()
    method = SoKA(rank=2, init_from="gradient")
    adapter = method.adapter(site(12, 9), None).double()
    with torch.no_grad():
        adapter.initialize(W, Evidence(torch.Generator(), gradient=G))
    U, _, V = kronecker_svd(G, Split(3, 3, 4, 3))
    _, S, _ = kronecker_svd(W, Split(3, 3, 4, 3))
    for k in range(2):
        expected = S[k] * torch.kron(U[k].contiguous(), V[k].contiguous())
        torch.testing.assert_close(torch.kron(adapter.A[k].detach(), adapter.B[k].detach()), expected, **EXACT)
    assert torch.equal(adapter.weight(W), W)
    assert {"A0", "B0"} <= set(adapter.state_dict())
    fresh = started(method, W)  # no evidence, as on load
    fresh.load_state_dict(adapter.state_dict())
    assert torch.equal(fresh.weight(W), W)


def test_the_gradient_is_asked_for_where_it_is_needed():
    assert SoKA(rank=2, init_from="gradient").evidence == ("gradient",)
    assert SoKA().evidence == ()
    with pytest.raises(UserError, match="needs evidence"):
        attach(nn.Sequential(nn.Linear(6, 8)), SoKA(rank=2, init_from="gradient"), "all")


# ---- the rest ----


def test_zero_weights_can_be_trained():
    adapter = started(SoKA(), torch.zeros(12, 9))
    found = gradients(adapter, torch.zeros(12, 9), torch.randn(12, 9))
    assert found["A"].any()
    assert found["B"].any()


def test_the_mark_does_not_see_signs():
    W = weight64()
    adapter = started(SoKA(rank=3), W)
    mark, flipped = adapter.fingerprint(), copy.deepcopy(adapter)
    flipped.A0[1] *= -1
    flipped.B0[1] *= -1
    torch.testing.assert_close(flipped.fingerprint(), mark)
    assert not torch.allclose(started(SoKA(rank=3), W.flip(0)).fingerprint(), mark, rtol=1e-3)
    assert set(adapter.state_dict()) == {"A", "B"}


def test_counts():
    """768 x 768: 1,600 a component; 4096 x 4096: 8,192, as LoRA's rank one."""
    assert SoKA(rank=1).count(site(768, 768)) == 1_600
    assert SoKA(rank=1).count(site(4096, 4096)) == 8_192 == 4096 + 4096
    assert SoKA().count(site(768, 768)) is None
    for method in (SoKA(rank=3), SoKA(rank=2, train_sigma=True)):
        assert trainables(method, site(8, 4, 3, 3)) == method.count(site(8, 4, 3, 3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: 0"),
        ({"selection": "all"}, "selection: 'all' is not one of both, energy, elbow"),
        ({"elbow": "knee"}, "elbow: 'knee' is not one of chord, second_difference"),
        ({"init_from": "update"}, "init_from: 'update' is not one of weight, gradient"),
        ({"energy": 0.0}, "energy: 0.0"),
        ({"energy": 1.1}, "energy: 1.1"),
        ({"max_rank": 0}, "max_rank: 0"),
        ({"reselect_every": -1}, "reselect_every: -1"),
        ({"init_from": "gradient"}, "rank: init_from gradient needs a number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        SoKA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match=r"rank: 2 does not fit .*, a 7 x 5 matrix of 1 Kronecker products"):
        SoKA(rank=2).adapter(site(7, 5), None)
