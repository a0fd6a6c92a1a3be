"""LoKr: Kronecker's product written out, how shapes are cut, and peft's layer as the oracle."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters._kronecker_shapes import kronecker_shapes, split
from vision_peft.adapters.lokr import LoKr
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize(
    "size, factor, expected",
    [
        (256, None, (16, 16)), (128, None, (8, 16)), (127, None, (1, 127)), (768, None, (24, 32)), (1, None, (1, 1)), (12, None, (3, 4)),
        (128, 4, (4, 32)), (128, 32, (4, 32)), (128, 5, (4, 32)), (12, 5, (3, 4)), (384, 1, (1, 384)), (7, 100, (1, 7)),
    ],
)  # fmt: skip
def test_how_a_size_is_split(size, factor, expected):
    assert split(size, factor) == expected


def test_splits_agree_with_those_of_peft():
    pytest.importorskip("peft")
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 400):
        assert split(size, None) == factorization(size)
        for factor in (2, 5, 8, 16):
            assert split(size, factor) == tuple(sorted(factorization(size, factor)))


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((12, 20), ((3, 4), (4, 5))), ((8, 4, 3, 3), ((2, 2), (4, 18))), ((4, 1, 3, 3), ((2, 1), (2, 9))),
        ((7, 13), ((1, 1), (7, 13))), ((10,), ((2, 1), (5, 1))),
    ],
)  # fmt: skip
def test_shapes_of_the_factors(shape, expected):
    assert kronecker_shapes(site(*shape), None) == expected


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    for both in (False, True):
        assert torch.equal(started(LoKr(rank=1, decompose_both=both), W).weight(W), W)


@pytest.mark.parametrize("both", [False, True])
def test_the_formula_block_by_block(both):
    """Block (i, j) of the update is s w1[i, j] w2."""
    W = weight64(48, 80)
    adapter = moved(LoKr(rank=2, alpha=3.0, decompose_both=both), W)
    w1, w2 = adapter.w1().detach(), adapter.w2.left @ adapter.w2.right
    assert (adapter.w1.left is not None) == both
    assert w1.shape == (6, 8)
    assert w2.shape == (8, 10)
    blocks = delta(adapter, W).view(6, 8, 8, 10).transpose(1, 2)
    for i in range(6):
        for j in range(8):
            torch.testing.assert_close(blocks[i, j], 1.5 * w1[i, j] * w2.detach(), **EXACT)


def test_only_one_factor_starts_at_zero():
    adapter = started(LoKr(rank=2, decompose_both=True), weight64(48, 80))
    zero = [name for name, factor in adapter.named_parameters() if not factor.any()]
    assert zero == ["w1.left"]
    assert 0.5 * 10**-0.5 < adapter.w2.right.abs().max() <= 10**-0.5


def test_gradients_by_hand():
    """dw1[i, j] = s <G_ij, w2>, dw2 = s sum of w1[i, j] G_ij over the blocks."""
    W, G = weight64(12, 20), weight64(12, 20)
    adapter = moved(LoKr(rank=3, alpha=2.0), W)  # w2 (4, 5) is dense: 3 >= 5 / 2
    found = gradients(adapter, W, G)
    blocks = G.view(3, 4, 4, 5).transpose(1, 2)  # (3, 4) blocks of (4, 5)
    s, w1, w2 = 2 / 3, adapter.w1().detach(), adapter.w2().detach()
    torch.testing.assert_close(found["w1.right"], s * (blocks * w2).sum((2, 3)), rtol=0, atol=1e-11)
    torch.testing.assert_close(found["w2.right"], s * torch.einsum("ij,ijab->ab", w1, blocks), rtol=0, atol=1e-11)


def test_rank_of_the_change_is_the_product_of_ranks():
    W = weight64(48, 80)
    assert torch.linalg.matrix_rank(delta(moved(LoKr(rank=2), W), W)) == 6 * 2
    assert torch.linalg.matrix_rank(delta(moved(LoKr(rank=2, decompose_both=True), W), W)) == 2 * 2


def test_a_left_factor_of_one_number_is_lora():
    W = weight64()
    adapter = moved(LoKr(rank=3, alpha=2.0, factor=1), W)
    assert adapter.w1().shape == (1, 1)
    torch.testing.assert_close(delta(adapter, W), 2 / 3 * adapter.w1().item() * adapter.w2.left @ adapter.w2.right, **EXACT)


@pytest.mark.parametrize("rank, dense", [(1, False), (2, False), (3, True)])
def test_the_second_factor_is_dense_from_half_its_size(rank, dense):
    adapter = LoKr(rank=rank).adapter(site(12, 20), None)  # w2 is 4 x 5
    assert (adapter.w2.left is None) == dense
    assert adapter.scale == 8 / rank


@pytest.mark.parametrize("rank, both", [(2, False), (2, True), (16, False)])
def test_against_the_layer_of_peft(rank, both):
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(80, 48))
    adapter = attach(network, LoKr(rank=rank, alpha=3.0, decompose_both=both), "all").adapters["0"]
    twin = nn.Sequential(nn.Linear(80, 48))
    twin.load_state_dict(network.state_dict())
    twin = peft.get_peft_model(twin, peft.LoKrConfig(r=rank, alpha=3, target_modules=["0"], decompose_both=both))
    layer = twin.base_model.model[0]
    for ours, theirs in ((adapter.w1, "lokr_w1"), (adapter.w2, "lokr_w2")):
        nn.init.normal_(ours.right)
        if ours.left is None:
            getattr(layer, theirs)["default"].data.copy_(ours.right.data)
        else:
            nn.init.normal_(ours.left)
            getattr(layer, theirs + "_a")["default"].data.copy_(ours.left.data)
            getattr(layer, theirs + "_b")["default"].data.copy_(ours.right.data)
    x = torch.randn(4, 80)
    torch.testing.assert_close(network(x), twin(x), rtol=1e-4, atol=1e-3)


def test_a_convolution_against_the_layer_of_peft():
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Conv2d(8, 12, 3))
    adapter = attach(network, LoKr(rank=1, alpha=3.0), "conv").adapters["0"]
    twin = nn.Sequential(nn.Conv2d(8, 12, 3))
    twin.load_state_dict(network.state_dict())
    layer = peft.get_peft_model(twin, peft.LoKrConfig(r=1, alpha=3, target_modules=["0"])).base_model.model[0]
    nn.init.normal_(adapter.w1.right)
    layer.lokr_w1["default"].data.copy_(adapter.w1.right.data)
    layer.lokr_w2_a["default"].data.copy_(adapter.w2.left.data)
    layer.lokr_w2_b["default"].data.copy_(adapter.w2.right.data)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(network(x), twin(x), rtol=1e-4, atol=1e-4)


def test_counts():
    """768 x 768 at r = 8: w1 24 x 24 and w2 of rank 8 on 32 x 32, 1,088; dense w2 from r = 16, 1,600; both low-rank 896."""
    assert LoKr(rank=8).count(site(768, 768)) == 24 * 24 + 8 * 64 == 1_088
    assert LoKr(rank=16).count(site(768, 768)) == 24 * 24 + 32 * 32 == 1_600
    assert LoKr(rank=8, decompose_both=True).count(site(768, 768)) == 8 * 48 + 8 * 64 == 896
    for shape in ((48, 80), (8, 4, 3, 3), (7, 13), (10,)):
        for both in (False, True):
            method = LoKr(rank=2, decompose_both=both)
            assert trainables(method, site(*shape)) == method.count(site(*shape))


@pytest.mark.parametrize("options, message", [({"rank": 0}, "rank: 0"), ({"factor": 0}, "factor: 0"), ({"factor": -1}, "factor: -1")])
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LoKr(**options)
