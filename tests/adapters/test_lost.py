"""LOST: what is cut out of the weight, the two branches, and both ways of keeping the pretrained weight."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from fakes import delta, gradients, moved, regress, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.lost import LOST
from vision_peft.engine.contract import run_contract
from vision_peft.engine.install import attach
from vision_peft.engine.site import enumerate_sites
from vision_peft.errors import UserError

SMALL = {"rank": 3, "density": 0.25}  # two of nine columns
LINEAR = {**SMALL, "activation": "identity"}


def branch(adapter, x, phi):
    A, B, C = (p.detach() for p in (adapter.A, adapter.B, adapter.C))
    return adapter.gamma * phi(x @ A.mT) @ B.mT + (1 - adapter.gamma) * x[..., adapter.columns] @ C.mT


def test_the_factors_are_the_best_approximation_of_their_rank():
    W = weight64()
    adapter = started(LOST(**SMALL), W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(adapter.B @ adapter.A, U[:, :3] * S[:3] @ Vh[:3], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(adapter.A @ adapter.A.mT, torch.diag(S[:3]), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(adapter.B.mT @ adapter.B, torch.diag(S[:3]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("complement", [2, 256])
def test_the_columns_are_the_largest_of_the_complement(complement):
    W = weight64()
    adapter = started(LOST(**SMALL, complement_rank=complement), W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    rest = U[:, 3 : 3 + complement] * S[3 : 3 + complement] @ Vh[3 : 3 + complement]
    expected = rest.norm(dim=0).topk(2).indices.sort().values
    assert torch.equal(adapter.columns, expected)
    assert torch.equal(adapter.C, W[:, expected])  # of W, not of the complement


def test_a_column_of_its_own_direction_is_found():
    """Column 4 carries a direction that the leading triplet does not."""
    W = 10 * torch.outer(torch.randn(12), torch.randn(9))
    W[:, 4] += torch.randn(12)
    assert started(LOST(rank=1, density=0.12), W).columns.tolist() == [4]


def test_the_layer():
    W, x, b = weight64(), torch.randn(2, 5, 9, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    adapter = moved(LOST(**SMALL, gamma=0.6), W)
    torch.testing.assert_close(adapter.linear(x, W, b), branch(adapter, x, F.silu) + b, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(branch(adapter, 2 * x, F.silu), 2 * branch(adapter, x, F.silu))
    plain = moved(LOST(**LINEAR, gamma=0.6), W)
    torch.testing.assert_close(plain.linear(x, W, b), branch(plain, x, lambda h: h) + b, rtol=1e-11, atol=1e-11)


def test_without_the_activation_there_is_a_weight():
    W, x = weight64(), torch.randn(5, 9, dtype=torch.float64)
    adapter = moved(LOST(**LINEAR), W)
    expected = 0.7 * adapter.B @ adapter.A
    for place, column in enumerate(adapter.columns.tolist()):
        expected[:, column] = expected[:, column] + 0.3 * adapter.C[:, place]
    torch.testing.assert_close(adapter.weight(W), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.linear(x, W, None), x @ expected.mT, rtol=1e-11, atol=1e-11)


def test_gradients_by_hand():
    W, G = weight64(), weight64()
    adapter = moved(LOST(**LINEAR), W)
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], 0.7 * G @ adapter.A.detach().mT, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found["A"], 0.7 * adapter.B.detach().mT @ G, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found["C"], 0.3 * G[:, adapter.columns], rtol=1e-11, atol=1e-12)


def test_gamma_zero_reads_the_chosen_features_alone_and_one_none_of_them():
    W, x = weight64(), torch.randn(5, 9, dtype=torch.float64)
    sparse = moved(LOST(**SMALL, gamma=0.0), W)
    other = torch.randn(5, 9, dtype=torch.float64)
    other[:, sparse.columns] = x[:, sparse.columns]
    torch.testing.assert_close(sparse.linear(other, W, None), sparse.linear(x, W, None))
    thin = moved(LOST(**LINEAR, gamma=1.0), W)
    assert torch.linalg.matrix_rank(thin.weight(W)) == 3


def test_the_pretrained_weight_is_thrown_away():
    W, x = weight64(), torch.randn(5, 9, dtype=torch.float64)
    adapter = moved(LOST(**SMALL), W)
    assert torch.equal(adapter.linear(x, W, None), adapter.linear(x, 0 * W, None))


def test_the_normal_start():
    """Standard deviation (r (m + n))^(-1/4)."""
    adapter = started(LOST(rank=16, start="normal"), torch.randn(90, 70))
    for factor in (adapter.A, adapter.B):
        assert factor.std().item() == pytest.approx((16 * 160) ** -0.25, rel=0.1)


@pytest.mark.parametrize("activation", ["silu", "identity"])
def test_kept_weights_start_at_the_identity(activation):
    W, x = weight64(), torch.randn(5, 9, dtype=torch.float64)
    method = LOST(**SMALL, activation=activation, pretrained="keep")
    adapter = started(method, W)
    y = adapter.linear(x, W, None) if activation == "silu" else x @ adapter.weight(W).mT
    torch.testing.assert_close(y, x @ W.mT, rtol=1e-12, atol=1e-12)
    assert method.identity_at_init
    assert adapter.A.any()
    assert adapter.B.any() == adapter.C.any() == (activation == "identity")


def test_kept_weights_with_the_activation():
    W, x = weight64(), torch.randn(5, 9, dtype=torch.float64)
    adapter = moved(LOST(**SMALL, pretrained="keep", alpha=6.0), W)
    expected = x @ W.mT + 2 * branch(adapter, x, F.silu)
    torch.testing.assert_close(adapter.linear(x, W, None), expected, rtol=1e-11, atol=1e-11)


def test_kept_weights_without_it():
    """W + (alpha / r) (branch now - branch at the start), whose last columns have no gradient."""
    W, eye = weight64(), torch.eye(9, dtype=torch.float64)
    method = LOST(**LINEAR, pretrained="keep", alpha=6.0)
    first, adapter = started(method, W), moved(method, W)
    expected = 2 * (branch(adapter, eye, lambda h: h) - branch(first, eye, lambda h: h)).mT
    torch.testing.assert_close(delta(adapter, W), expected, rtol=1e-10, atol=1e-11)
    form = adapter.factored(W)
    assert form.trained == 5
    assert form.B.shape[1] == 8
    assert torch.equal(form.A[5:], first.A)  # what has no gradient is the start
    torch.testing.assert_close(form.B @ form.A, expected, rtol=1e-10, atol=1e-11)


def test_what_is_saved_and_what_is_pinned():
    W = weight64()
    for options in ({}, {"activation": "identity"}, {"pretrained": "keep"}):
        adapter = started(LOST(**SMALL, **options), W)
        assert set(adapter.state_dict()) == {"A", "B", "C", "columns"}
        assert adapter.fingerprint() is None
    kept = LOST(**LINEAR, pretrained="keep")
    mark = started(kept, W).fingerprint()
    assert not torch.allclose(mark, started(kept, W.flip(0)).fingerprint(), rtol=1e-3)


def test_training_from_scratch_learns_and_keeps_its_columns():
    torch.manual_seed(0)
    network = nn.Linear(9, 12)
    adapters = attach(network, LOST(**SMALL), "all")
    adapter = next(iter(adapters.adapters.values()))
    columns, x, target = adapter.columns.clone(), torch.randn(64, 9), torch.randn(64, 12)
    losses = regress(network, adapters, x, target, lr=0.02)
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(adapter.columns, columns)


OTHERS = [dict(zip(("activation", "pretrained"), pair)) for pair in itertools.product(("silu", "identity"), ("discard", "keep"))]


@pytest.mark.parametrize("options", [*OTHERS, {"activation": "identity", "start": "normal"}])
def test_the_contract_in_every_mode(options):
    network, x = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8)), torch.randn(5, 12)
    checks = run_contract(network, enumerate_sites(network), LOST(**SMALL, **options), lambda network: network(x))
    assert not [check for check in checks if not check.passed]


@pytest.mark.parametrize("pretrained", ["discard", "keep"])
def test_convolutions_where_there_is_a_weight(pretrained):
    network, x = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3, groups=2)), torch.randn(2, 4, 7, 7)
    checks = run_contract(network, enumerate_sites(network), LOST(**LINEAR, pretrained=pretrained), lambda network: network(x))
    assert not [check for check in checks if not check.passed]


def test_the_activation_needs_a_layer_that_shows_its_input():
    kernel = site(8, 4, 3, 3, kind="conv")
    assert not LOST().suits(kernel)
    assert LOST(activation="identity").suits(kernel)


def test_half_precision_layers():
    adapter = started(LOST(**SMALL), torch.randn(12, 9))
    W, x = torch.randn(12, 9).bfloat16(), torch.randn(5, 9).bfloat16()
    assert adapter.linear(x, W, torch.zeros(12).bfloat16()).dtype == torch.bfloat16


def test_counts():
    """768 x 768 at r = 128, 1 %: seven columns, 201,984; 768 -> 3072: 491,520 + 21,504."""
    assert LOST().count(site(768, 768)) == 201_984
    assert LOST().count(site(3072, 768)) == 513_024
    assert LOST(density=0.001).columns(site(768, 768)) == 1
    assert trainables(LOST(**SMALL), site(12, 9)) == LOST(**SMALL).count(site(12, 9)) == 87


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: 0"),
        ({"density": 0.0}, "density: 0.0 is not in"),
        ({"density": 1.5}, "density: 1.5"),
        ({"gamma": 1.1}, "gamma: 1.1 is not in"),
        ({"gamma": -0.1}, "gamma: -0.1"),
        ({"activation": "gelu"}, "activation: 'gelu' is not one of silu, identity"),
        ({"complement_rank": 0}, "complement_rank: 0 is not positive"),
        ({"start": "zero"}, "start: 'zero' is not one of svd, normal"),
        ({"pretrained": "no"}, "pretrained: 'no' is not one of discard, keep"),
        ({"start": "normal", "pretrained": "keep", "activation": "identity"}, "start: normal cannot be subtracted"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LOST(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 128 does not fit"):
        LOST().adapter(site(12, 9), None)
