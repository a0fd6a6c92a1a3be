"""BOFT: the butterfly written out with permutation matrices, its reach, odd widths, PEFT's layer as an oracle."""

from __future__ import annotations

import pytest
import torch
from fakes import gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.boft import BOFT
from vision_peft.adapters.oft import OFT
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-10}


def factor(adapter, j, n):
    """R_j (n, n): two half-blocks, 2^j half-blocks apart, are turned together."""
    blocks, half = adapter.factors[j], adapter.half
    R = torch.eye(adapter.width, dtype=torch.float64)
    starts = [(g + i, g + i + 2**j) for g in range(0, adapter.width // half, 2 ** (j + 1)) for i in range(2**j)]
    for Q, (first, second) in zip(blocks.skew().detach(), starts):
        where = torch.tensor([*range(first * half, first * half + half), *range(second * half, second * half + half)])
        eye = torch.eye(len(Q), dtype=Q.dtype)
        R[where[:, None], where] = (eye - Q) @ torch.linalg.inv(eye + Q)
    assert torch.equal(R[n:, n:], torch.eye(adapter.width - n).double()), "padding is left alone"
    return R[:n, :n]


def product(adapter, n):
    R = torch.eye(n, dtype=torch.float64)
    for j in range(len(adapter.factors)):
        R = factor(adapter, j, n) @ R
    return R


@pytest.mark.parametrize(
    "n, b, m, used", [(16, 4, 3, 3), (16, 2, 4, 4), (9, 4, 2, 2), (36, 4, 3, 3), (6, 4, 3, 1), (3, 4, 2, 1), (11, 2, 2, 2)]
)
def test_the_formula(n, b, m, used):
    W = weight64(6, n)
    adapter = moved(BOFT(block_size=b, factors=m), W)
    R = product(adapter, n)
    assert len(adapter.factors) == used
    torch.testing.assert_close(R @ R.mT, torch.eye(n).double(), **EXACT)
    torch.testing.assert_close(adapter.weight(W), adapter.g[:, None] * (W @ R.mT), **EXACT)


def test_starts_at_the_identity_bit_for_bit():
    for shape in ((12, 9), (8, 36), (5, 64)):
        W = torch.randn(shape)
        assert torch.equal(started(BOFT(), W).weight(W), W)


def test_lengths_and_angles_of_the_neurons_stay_without_the_gain():
    W = weight64(12, 10)
    turned = moved(BOFT(factors=2, magnitude=False), W).weight(W)
    torch.testing.assert_close(turned @ turned.mT, W @ W.mT, **EXACT)


def test_the_gain_is_the_length():
    W = weight64()
    adapter = moved(BOFT(), W)
    torch.testing.assert_close(adapter.weight(W).norm(dim=1), adapter.g.abs() * W.norm(dim=1), **EXACT)


@pytest.mark.parametrize("b", [2, 4])
def test_each_factor_doubles_the_reach(b):
    """Every input meets b 2^(factors - 1) others; 1 + log2(n / b) factors meet all."""
    n = 16
    full = {2: 4, 4: 3}[b]
    for m in range(1, full + 1):
        adapter = moved(BOFT(block_size=b, factors=m, magnitude=False), weight64(6, n))
        met = (product(adapter, n).abs() > 1e-12).sum(1)
        assert (met == b * 2 ** (m - 1)).all()


def test_one_factor_is_oft():
    W = weight64(6, 12)
    ours, oft = moved(BOFT(block_size=4, factors=1), W), started(OFT(block_size=4, magnitude=True), W)
    with torch.no_grad():
        oft.blocks.theta.copy_(ours.factors[0].theta)
        oft.g.copy_(ours.g)
    torch.testing.assert_close(ours.weight(W), oft.weight(W), **EXACT)


def test_gradients_reach_every_factor_at_the_start():
    W = weight64(6, 16)
    found = gradients(started(BOFT(block_size=4, factors=3), W), W, weight64(6, 16))
    assert set(found) == {"factors.0.theta", "factors.1.theta", "factors.2.theta", "g"}
    assert all((gradient != 0).all() for gradient in found.values())


def test_gradient_of_the_gain():
    W, G = weight64(6, 8), weight64(6, 8)
    adapter = moved(BOFT(), W)
    torch.testing.assert_close(gradients(adapter, W, G)["g"], (G * (W @ product(adapter, 8).mT)).sum(1), **EXACT)


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor")
def test_against_the_layer_of_peft_with_one_factor():
    """More factors need its CUDA kernel."""
    peft = pytest.importorskip("peft")
    network, twin = nn.Sequential(nn.Linear(8, 5)), nn.Sequential(nn.Linear(8, 5))
    twin.load_state_dict(network.state_dict())
    adapter = attach(network, BOFT(block_size=4, factors=1), "all").adapters["0"]
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["0"])
    layer = peft.get_peft_model(twin, config).base_model.model[0]
    with torch.no_grad():
        adapter.factors[0].theta.normal_()
        adapter.g.normal_()
        layer.boft_R["default"].copy_(adapter.factors[0].skew())
        layer.boft_s["default"].copy_(adapter.g[:, None])
    x = torch.randn(4, 8)
    torch.testing.assert_close(network(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n, m", [(8, 2), (16, 3), (32, 4)])
def test_wiring_against_the_permutations_of_peft(n, m):
    """Factor j of their layer is P B P^T with B block diagonal."""
    layer = pytest.importorskip("peft.tuners.boft.layer").BOFTLayer
    adapter = moved(BOFT(block_size=4, factors=m), weight64(5, n))
    for j in range(m):
        P = layer.perm2mat(None, layer.block_butterfly_perm(None, n, n // 4 // 2**j, 2, m - 1)).double()
        eye = torch.eye(4).double()
        blocks = torch.block_diag(*((eye - Q) @ torch.linalg.inv(eye + Q) for Q in adapter.factors[j].skew().detach()))
        torch.testing.assert_close(P @ blocks @ P.mT, factor(adapter, j, n), **EXACT)


def test_dropped_blocks_are_of_one_factor_and_only_while_training():
    W = weight64(6, 16)
    adapter = moved(BOFT(block_size=4, factors=2, block_dropout=0.5, magnitude=False), W)
    exact = W @ product(adapter, 16).mT
    adapter.eval()
    torch.testing.assert_close(adapter.weight(W), exact, **EXACT)
    adapter.train()
    dropped = adapter.weight(W)
    assert (dropped - exact).abs().max() > 1e-3
    torch.testing.assert_close(dropped @ dropped.mT, W @ W.mT, **EXACT)
    assert len({round(float(adapter.weight(W).detach().sum()), 6) for _ in range(20)}) > 3


def test_counts():
    """768 inputs, blocks of 8, two factors: 2 * 768 * 7 / 2 + rows."""
    assert BOFT(block_size=8, factors=2).count(site(3072, 768)) == 5_376 + 3_072
    assert BOFT(block_size=8, factors=2, magnitude=False).count(site(768, 768)) == 5_376
    for method in (BOFT(), BOFT(block_size=2, factors=4), BOFT(block_size=6, factors=3, magnitude=False)):
        for shape in ((12, 9), (8, 4, 3, 3), (4, 2), (5, 7)):
            assert trainables(method, site(*shape)) == method.count(site(*shape))


def test_single_inputs_are_passed_over():
    assert not BOFT().suits(site(8, 1, 1, 1, kind="conv"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 3}, "block_size: 3"),
        ({"block_size": 0}, "block_size: 0"),
        ({"factors": 0}, "factors: 0"),
        ({"block_dropout": 1.0}, "block_dropout: 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        BOFT(**options)
