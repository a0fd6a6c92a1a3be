"""GoRA: ranks by importance, and a start that goes downhill."""

from __future__ import annotations

import math

import pytest
import torch
from fakes import delta, gradients, site, trainables, weight64
from torch import nn

from vision_peft.adapters.gora import GoRA
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.evidence import collect
from vision_peft.engine.install import attach
from vision_peft.engine.site import enumerate_sites
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-10}


def fresh(method, W, G):
    """Before ranks are dealt out."""
    adapter = method.adapter(site(*W.shape), None).to(W.dtype)
    with torch.no_grad():
        adapter.initialize(W, Evidence(torch.Generator().manual_seed(0), gradient=G))
    return adapter


def started(method, W, G, k=3):
    adapter = fresh(method, W, G)
    with torch.no_grad():
        adapter.settle(k)
    return adapter


def dealt(method, *importances, shapes=None):
    shapes = shapes or [(12, 12)] * len(importances)
    pairs = zip(importances, shapes)
    adapters = {str(i): fresh(method, torch.ones(shape), torch.full(shape, size)) for i, (size, shape) in enumerate(pairs)}
    with torch.no_grad():
        method.allocate(adapters, None)
    return [int(each.mask.sum()) for each in adapters.values()]


@pytest.mark.parametrize("scaling", ["rank", "sqrt_rank"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_start_is_minus_the_projected_gradient(k, scaling):
    """s_k B A = -gamma sqrt(n / k) G P: the scale of k, and alpha, cancel."""
    W, G = weight64(), weight64()
    adapter = started(GoRA(rank=2, alpha=7.0, scaling=scaling, gamma=0.1), W, G, k)
    A = adapter.A[:k].detach()
    P = torch.linalg.pinv(A) @ A
    torch.testing.assert_close(delta(adapter, W), -0.1 * math.sqrt(9 / k) * G @ P, **EXACT)


def test_b_is_the_best_for_this_a():
    """Least squares: what is left of -G is orthogonal to every row of A."""
    W, G = weight64(), weight64()
    adapter = started(GoRA(rank=3, gamma=1.0), W, G)
    step = delta(adapter, W) / math.sqrt(9 / 3)
    torch.testing.assert_close((G + step) @ adapter.A[:3].detach().mT, torch.zeros(12, 3).double(), **EXACT)


def test_the_step_goes_down():
    W, G = weight64(), weight64()
    assert (delta(started(GoRA(rank=3), W, G), W) * G).sum() < -1e-3


def test_the_loss_of_a_network_falls_by_the_start_alone():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    x, target = torch.randn(64, 9), torch.randn(64, 4)

    def loss(_):
        return (network(x) - target).square().mean()

    before = float(loss(None).detach())
    method = GoRA(rank=2)
    evidence = collect(network, enumerate_sites(network)[::2], method.evidence, [None], loss)
    attach(network, method, "all", evidence=evidence)
    assert float(loss(None).detach()) < before - 1e-3


def test_the_step_is_about_as_large_as_one_of_the_gradient():
    """The root makes up for the projection, which keeps k of n directions."""
    torch.manual_seed(0)
    W, G = torch.randn(200, 100).double(), torch.randn(200, 100).double()
    for k in (2, 20):
        size = delta(started(GoRA(rank=8), W, G, k), W).norm() / (0.05 * G.norm())
        assert 0.8 < size < 1.2


def test_importance():
    W, G = weight64(), weight64()
    torch.testing.assert_close(fresh(GoRA(rank=2), W, G).importance, (W.abs() * G.abs()).mean(), **EXACT)


def test_ranks_follow_importance_within_the_bounds():
    assert dealt(GoRA(rank=2, min_rank=1), 1.0, 1.0, 1.0) == [2, 2, 2]
    assert dealt(GoRA(rank=2, min_rank=1), 3.0, 2.0, 1.0) == [3, 2, 1]
    assert dealt(GoRA(rank=2, min_rank=1), 1e3, 1.0, 1.0) == [6, 1, 1]
    assert dealt(GoRA(rank=2, min_rank=2), 3.0, 2.0, 1.0) == [3, 2, 2]
    assert dealt(GoRA(rank=2, min_rank=1, max_rank=2), 3.0, 2.0, 1.0) == [2, 2, 1]
    assert dealt(GoRA(rank=4), 1e3, 1.0, 1.0) == [11, 2, 2]
    assert dealt(GoRA(rank=3), 1e3, 1.0) == [6, 1]


def test_a_wide_weight_gets_fewer_ranks_for_the_same_share():
    """A budget of 2 (24 + 72) numbers: half of it is 4 ranks of a 12 x 12 weight, one of a 36 x 36 weight."""
    assert dealt(GoRA(rank=2, min_rank=1), 1.0, 1.0, shapes=[(12, 12), (36, 36)]) == [4, 1]


def test_no_gradient_at_all_deals_evenly_and_starts_as_lora():
    assert dealt(GoRA(rank=2), 0.0, 0.0, 0.0) == [2, 2, 2]
    W = torch.randn(12, 9)
    adapter = started(GoRA(rank=2), W, torch.zeros(12, 9))
    assert torch.equal(adapter.weight(W), W)
    assert gradients(adapter, W, torch.randn(12, 9))["B"].any()


@pytest.mark.parametrize("scaling, scale", [("rank", 7 / 3), ("sqrt_rank", 7 / 3**0.5)])
@pytest.mark.parametrize("offset", [False, True])
def test_the_formula_after_training(scaling, scale, offset):
    W, G = weight64(), weight64()
    adapter = started(GoRA(rank=2, alpha=7.0, scaling=scaling, offset=offset), W, G)
    start = (adapter.B[:, :3] @ adapter.A[:3]).detach() if offset else 0
    with torch.no_grad():
        adapter.A.normal_(), adapter.B.normal_()
    torch.testing.assert_close(delta(adapter, W), scale * ((adapter.B[:, :3] @ adapter.A[:3]).detach() - start), **EXACT)


def test_with_the_offset_it_starts_at_the_identity():
    W, G = torch.randn(12, 9), torch.randn(12, 9)
    method = GoRA(rank=3, offset=True)
    torch.testing.assert_close(started(method, W, G).weight(W), W, rtol=0, atol=1e-5)
    assert (method.identity_at_init, GoRA().identity_at_init) == (True, False)


def test_masked_ranks_neither_act_nor_learn():
    W, G = weight64(), weight64()
    found = gradients(started(GoRA(rank=2), W, G), W, G)
    assert found["A"][:3].abs().min() > 0
    assert not found["A"][3:].any()
    assert not found["B"][:, 3:].any()


@pytest.mark.parametrize("offset", [False, True])
def test_compact_keeps_the_ranks_that_act(offset):
    W, G = weight64(), weight64()
    adapter = started(GoRA(rank=2, offset=offset), W, G)
    with torch.no_grad():
        adapter.A.normal_(), adapter.B.normal_()
    small = adapter.compact()
    assert (small.A.shape, small.B.shape) == ((3, 9), (12, 3))
    torch.testing.assert_close(small.weight(W), adapter.weight(W), **EXACT)


@pytest.mark.parametrize("offset, keys", [(False, set()), (True, {"A0", "B0"})])
def test_what_is_saved_and_restored(offset, keys):
    W, G = torch.randn(12, 9), torch.randn(12, 9)
    adapter = started(GoRA(rank=2, offset=offset), W, G, 5)
    assert set(adapter.state_dict()) == {"A", "B", "mask", "importance"} | keys
    other = started(GoRA(rank=2, offset=offset), W, None, 2)
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other.weight(W), adapter.weight(W))


def test_counts():
    """What is held is max_rank times m + n: four times LoRA's by default."""
    assert GoRA().count(site(768, 768)) == 4 * 12_288
    assert GoRA(max_rank=8).count(site(768, 768)) == 12_288
    for shape in ((12, 9), (4, 2, 3, 3), (20, 12)):
        each = site(*shape)
        assert trainables(GoRA(rank=2), each) == GoRA(rank=2).count(each) == min(8, shape[0]) * sum(each.matrix_shape)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gamma": 0.0}, "gamma: 0.0 is not positive"),
        ({"min_rank": 0}, "min_rank: 0 is not within 1 and the rank, 8"),
        ({"min_rank": 9}, "min_rank: 9 is not within"),
        ({"max_rank": 7}, "max_rank: 7 is less than the rank, 8"),
        ({"alpha": 0.0}, "alpha: 0.0"),
        ({"rank": 0}, "rank: 0"),
        ({"scaling": "x"}, "scaling"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        GoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        GoRA(rank=10).adapter(site(12, 9), None)
