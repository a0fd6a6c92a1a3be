"""SLTrain: what the layer is at the start and after, a support that stays, and gradients without a dense matrix kept."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fakes import delta, gradients, moved, regress, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.sltrain import SLTrain
from vision_peft.engine.contract import run_contract
from vision_peft.engine.install import attach
from vision_peft.engine.site import enumerate_sites
from vision_peft.errors import UserError

SMALL = {"rank": 3, "density": 0.2, "alpha": 2.0}


def scattered(adapter, shape):
    S = torch.zeros(shape, dtype=adapter.v.dtype)
    for position, value in zip(adapter.support.tolist(), adapter.v.detach()):
        S[position // shape[1], position % shape[1]] = value
    return S


@pytest.mark.parametrize("pretrained", ["discard", "keep"])
def test_the_formula(pretrained):
    W = weight64()
    adapter = moved(SLTrain(**SMALL, pretrained=pretrained), W)
    expected = 2 / 3 * adapter.B @ adapter.A + scattered(adapter, W.shape) + (W if pretrained == "keep" else 0)
    torch.testing.assert_close(adapter.weight(W), expected, rtol=1e-12, atol=1e-13)


def test_a_trained_scale():
    W, G = weight64(), weight64()
    adapter = moved(SLTrain(**SMALL, trainable_scaling=True), W)
    expected = adapter.theta.tanh() * adapter.B @ adapter.A + scattered(adapter, W.shape)
    torch.testing.assert_close(adapter.weight(W), expected, rtol=1e-12, atol=1e-13)
    slope = (1 - adapter.theta.tanh() ** 2) * (G * (adapter.B @ adapter.A)).sum()
    torch.testing.assert_close(gradients(adapter, W, G)["theta"], slope.detach(), rtol=1e-10, atol=1e-12)
    assert started(SLTrain(**SMALL, trainable_scaling=True), W).theta.item() == 1


def test_the_start_is_the_sparse_matrix_alone():
    W = torch.randn(40, 25)
    adapter = started(SLTrain(**SMALL), W)
    assert torch.equal(adapter.weight(W), scattered(adapter, W.shape))
    assert adapter.v.abs().max() <= 1 / math.sqrt(25)
    assert 0.9 < adapter.v.std().item() / (1 / math.sqrt(75)) < 1.1
    assert not adapter.B.any()


def test_kept_weights_start_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    method = SLTrain(**SMALL, pretrained="keep")
    assert torch.equal(started(method, W).weight(W), W)
    assert method.identity_at_init
    assert not SLTrain().identity_at_init


def test_the_pretrained_weight_is_thrown_away():
    W = weight64()
    adapter = moved(SLTrain(**SMALL), W)
    assert torch.equal(adapter.weight(W), adapter.weight(torch.zeros_like(W)))


def test_the_support_is_sorted_unique_and_of_the_right_size():
    support = started(SLTrain(rank=2, density=0.03), torch.randn(64, 50)).support
    assert len(support) == int(0.03 * 64 * 50)
    assert (support.diff() > 0).all()
    assert 0 <= support.min() <= support.max() < 64 * 50
    assert support.dtype == torch.int32


def test_the_seed_decides_the_support_and_it_is_saved():
    W = torch.randn(12, 9)
    one, again, other = (started(SLTrain(**SMALL), W, seed=seed).support for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert set(started(SLTrain(**SMALL), W).state_dict()) == {"A", "B", "v", "support"}


def test_gradients_by_hand():
    """dB = s G A^T, dA = s B^T G, dv = G on the support."""
    W, G = weight64(), weight64()
    adapter = moved(SLTrain(**SMALL), W)
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], 2 / 3 * G @ adapter.A.detach().mT, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found["A"], 2 / 3 * adapter.B.detach().mT @ G, rtol=1e-11, atol=1e-12)
    assert torch.equal(found["v"], G.flatten()[adapter.support.long()])


@pytest.mark.parametrize("pretrained", ["discard", "keep"])
def test_the_layer_gives_output_and_gradients_of_the_dense_construction(pretrained):
    W, x, b = weight64(), torch.randn(4, 5, 9, dtype=torch.float64, requires_grad=True), torch.randn(12, dtype=torch.float64)
    adapter = moved(SLTrain(**SMALL, pretrained=pretrained, trainable_scaling=True), W)
    results = []
    for y in (adapter.linear(x, W, b), F.linear(x, adapter.weight(W), b)):
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *adapter.parameters()])])
    for ours, dense in zip(*results):
        torch.testing.assert_close(ours, dense, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [(64, 96), (256, 384)])
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_m_n(size):
    network = nn.Linear(*size)
    attach(network, SLTrain(rank=2, density=0.001), "all")
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        network(torch.randn(5, size[0], requires_grad=True))
    kept.pop(network.weight.data_ptr(), None)
    assert 0 < sum(t.numel() for t in kept.values()) < 12 * sum(size)


def test_training_stays_on_the_support():
    torch.manual_seed(0)
    network = nn.Linear(9, 12)
    adapters = attach(network, SLTrain(**SMALL), "all")
    adapter = next(iter(adapters.adapters.values()))
    support, x, target = adapter.support.clone(), torch.randn(64, 9), torch.randn(64, 12)
    losses = regress(network, adapters, x, target, lr=0.02)
    assert losses[-1] < losses[0]
    assert torch.equal(adapter.support, support)
    rest = (adapter.weight(network.weight) - adapter.scale * adapter.B @ adapter.A).detach().flatten()
    on = torch.zeros(108, dtype=torch.bool).index_fill(0, support.long(), True)
    assert rest[~on].abs().max() < 1e-6
    assert (rest[on].abs() > 1e-4).all()


def test_density_zero_is_a_product_alone_and_one_is_dense():
    W = weight64()
    thin = moved(SLTrain(rank=3, density=0.0), W)
    assert thin.v.numel() == 0
    assert torch.linalg.matrix_rank(thin.weight(W)) == 3
    full = started(SLTrain(rank=3, density=1.0), W)
    assert torch.equal(full.support, torch.arange(108, dtype=torch.int32))
    assert torch.equal(full.weight(W), full.v.view(12, 9))


def test_the_rank_of_the_change_is_not_that_of_the_product():
    assert torch.linalg.matrix_rank(delta(moved(SLTrain(**SMALL, pretrained="keep"), weight64()), weight64())) > 3


@pytest.mark.parametrize("options", [{"pretrained": "keep"}, {"trainable_scaling": True}])
def test_the_contract_in_the_other_modes(options):
    network, x = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8)), torch.randn(5, 12)
    checks = run_contract(network, enumerate_sites(network), SLTrain(**SMALL, **options), lambda network: network(x))
    assert not [check for check in checks if not check.passed]


def test_counts():
    """214,302 for 768 x 768 at r = 128; 562,298 for 768 -> 3072."""
    assert SLTrain().count(site(768, 768)) == 214_302
    assert SLTrain().count(site(3072, 768)) == 562_298
    assert trainables(SLTrain(**SMALL), site(8, 4, 3, 3)) == SLTrain(**SMALL).count(site(8, 4, 3, 3))
    assert trainables(SLTrain(**SMALL, trainable_scaling=True), site(12, 9)) == SLTrain(**SMALL).count(site(12, 9)) + 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: 0"),
        ({"density": 1.1}, "density: 1.1 is not in"),
        ({"density": -0.1}, "density: -0.1"),
        ({"pretrained": "yes"}, "pretrained: 'yes' is not one of discard, keep"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        SLTrain(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 128 does not fit"):
        SLTrain().adapter(site(12, 9), None)
