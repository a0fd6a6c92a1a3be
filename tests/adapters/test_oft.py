"""OFT: one rotation for all neurons, what it preserves, widths that blocks do not divide, PEFT's layer as an oracle."""

from __future__ import annotations

import pytest
import torch
from fakes import gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.oft import OFT
from vision_peft.engine.adapter import Clock
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-10}


def rotation(adapter, n):
    """R (n, n), block by block: (I - Q)(I + Q)^-1."""
    blocks = []
    for Q in adapter.blocks.skew().detach():
        eye = torch.eye(len(Q), dtype=Q.dtype)
        blocks.append((eye - Q) @ torch.linalg.inv(eye + Q))
    return torch.block_diag(*blocks)[:n, :n]


@pytest.mark.parametrize("n, b, blocks", [(12, 4, 3), (9, 4, 3), (7, 3, 3), (5, 8, 1), (10, 4, 3), (11, 2, 6)])
@pytest.mark.parametrize("options", [{}, {"share": True}, {"magnitude": True}])
def test_the_formula(n, b, blocks, options):
    W = weight64(6, n)
    adapter = moved(OFT(block_size=b, **options), W)
    R = rotation(adapter, n)
    gain = adapter.g[:, None] if adapter.g is not None else 1
    assert len(adapter.blocks.skew()) == blocks
    torch.testing.assert_close(R @ R.mT, torch.eye(n).double(), **EXACT)
    torch.testing.assert_close(adapter.weight(W), gain * (W @ R.mT), **EXACT)
    assert (adapter.weight(W) - W).abs().max() > 0.1


def test_starts_at_the_identity_bit_for_bit():
    for shape in ((12, 9), (8, 36), (5, 64)):
        W = torch.randn(shape)
        assert torch.equal(started(OFT(), W).weight(W), W)


def test_lengths_and_angles_of_the_neurons_stay():
    W = weight64()
    turned = moved(OFT(block_size=4), W).weight(W)
    torch.testing.assert_close(turned @ turned.mT, W @ W.mT, **EXACT)
    torch.testing.assert_close(torch.linalg.svdvals(turned), torch.linalg.svdvals(W), **EXACT)


def test_q_is_skew_and_its_upper_triangle_is_trained_in_order():
    adapter = started(OFT(block_size=3), weight64(4, 6))
    with torch.no_grad():
        adapter.blocks.theta.copy_(torch.arange(1.0, 7))
    expected = torch.tensor([[[0, 1, 2], [-1, 0, 3], [-2, -3, 0]], [[0, 4, 5], [-4, 0, 6], [-5, -6, 0]]]).double()
    assert torch.equal(adapter.blocks.skew(), expected)


def test_shared_blocks_are_one_block():
    adapter = moved(OFT(block_size=3, share=True), weight64(4, 9))
    Q = adapter.blocks.skew()
    assert adapter.blocks.theta.shape == (3,)
    assert torch.equal(Q[0], Q[1])
    assert torch.equal(Q[0], Q[2])


def test_a_partial_block_turns_what_exists():
    """9 inputs in blocks of 4: sizes 3, 3, 3; 10 inputs: 4, 4, 2."""
    assert [OFT(block_size=4).layout(n).shape for n in (9, 10)] == [(3, 3), (3, 4)]
    adapter = moved(OFT(block_size=4), weight64(4, 10))
    assert (rotation(adapter, 12 - 2)[8:, 8:] != 0).all()
    assert adapter.blocks.theta.shape == (6 + 6 + 1,)


def test_gradient_at_the_start():
    """R = I - 2 Q to first order, W' = W (I + 2 Q): dL/dQ_ab = 2 ((W^T G)_ab - (W^T G)_ba) above the diagonal."""
    W, G = weight64(6, 4), weight64(6, 4)
    found = gradients(started(OFT(block_size=4), W), W, G)["blocks.theta"]
    core = 2 * (W.mT @ G)
    rows, columns = torch.triu_indices(4, 4, 1)
    torch.testing.assert_close(found, (core - core.mT)[rows, columns], **EXACT)


def test_against_the_layer_of_peft():
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(12, 5))
    adapter = attach(network, OFT(block_size=4), "all").adapters["0"]
    twin = nn.Sequential(nn.Linear(12, 5))
    twin.load_state_dict(network.state_dict())
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["0"], use_cayley_neumann=False)
    layer = peft.get_peft_model(twin, config).base_model.model[0]
    theirs = layer.oft_R["default"].weight
    with torch.no_grad():
        adapter.blocks.theta.normal_()
        theirs.copy_(adapter.blocks.theta.view(3, 6))
    x, G = torch.randn(4, 12), torch.randn(4, 5)
    torch.testing.assert_close(network(x), layer(x), rtol=1e-4, atol=1e-5)
    (network(x) * G).sum().backward()
    (layer(x) * G).sum().backward()
    torch.testing.assert_close(adapter.blocks.theta.grad.view(3, 6), theirs.grad, rtol=1e-4, atol=1e-5)


# ---- constrained ----


@pytest.mark.parametrize("n, share, blocks", [(12, False, 3), (10, False, 3), (12, True, 1)])
def test_the_radius_holds_after_a_step(n, share, blocks):
    W = weight64(6, n)
    method = OFT(block_size=4, share=share, radius=0.3)
    adapter = moved(method, W)
    before = adapter.blocks.skew().detach()
    with torch.no_grad():
        method.coordinate({"q": adapter}, None, Clock(1, 10, 0))
    after, bound = adapter.blocks.skew().detach(), 0.3 / blocks**0.5
    sizes = torch.linalg.matrix_norm(after)
    assert (sizes <= bound + 1e-12).all()
    expected = before * (bound / torch.linalg.matrix_norm(before).clamp(min=bound))[:, None, None]
    torch.testing.assert_close(after, expected, **EXACT)


def test_inside_the_radius_nothing_moves():
    adapter = moved(OFT(block_size=4, radius=100.0), weight64())
    before = adapter.blocks.theta.detach().clone()
    with torch.no_grad():
        adapter.constrain(100.0)
    assert torch.equal(adapter.blocks.theta, before)


def test_the_start_survives_the_constraint():
    adapter = started(OFT(block_size=4, radius=0.1), weight64())
    with torch.no_grad():
        adapter.constrain(0.1)
    assert not adapter.blocks.theta.any()


def test_without_a_radius_angles_are_free():
    method = OFT(block_size=4)
    adapter = moved(method, weight64())
    before = adapter.blocks.theta.detach().clone()
    with torch.no_grad():
        method.coordinate({"q": adapter}, None, Clock(1, 10, 0))
    assert torch.equal(adapter.blocks.theta, before)


# ---- dropout of blocks ----


def test_dropped_blocks_are_the_identity_while_training_only():
    W = weight64(6, 40)
    adapter = moved(OFT(block_size=4, block_dropout=0.35), W)
    adapter.train()
    kept = (adapter.weight(W) - W).abs().amax(0).view(10, 4).amax(1) > 1e-12
    assert kept.sum() == 7  # int(0.35 * 10) are dropped
    assert len({tuple(((adapter.weight(W) - W).abs().amax(0).view(10, 4).amax(1) > 1e-12).tolist()) for _ in range(10)}) > 1
    adapter.eval()
    assert ((adapter.weight(W) - W).abs().amax(0) > 1e-12).all()


# ---- counts and options ----


def test_counts():
    """ViT-B, 768 inputs in blocks of 32: 11,904 a weight, whatever its height; all blocks alike: 496."""
    assert OFT().count(site(768, 768)) == OFT().count(site(3072, 768)) == 768 * 31 // 2 == 11_904
    assert OFT(share=True).count(site(768, 768)) == 496
    assert OFT(magnitude=True).count(site(3072, 768)) == 11_904 + 3_072
    for method in (OFT(), OFT(block_size=4), OFT(block_size=4, share=True), OFT(block_size=5, magnitude=True)):
        for shape in ((12, 9), (8, 4, 3, 3), (4, 2)):
            assert trainables(method, site(*shape)) == method.count(site(*shape))


def test_single_inputs_are_passed_over():
    assert not OFT().suits(site(8, 1, 1, 1, kind="conv"))
    assert OFT().suits(site(8, 2))


def test_no_index_is_saved():
    assert set(started(OFT(magnitude=True), weight64()).state_dict()) == {"blocks.theta", "g"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 1}, "block_size: 1"),
        ({"radius": 0.0}, "radius: 0.0"),
        ({"block_dropout": 1.0}, "block_dropout: 1.0"),
        ({"block_dropout": -0.1}, "block_dropout: -0.1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        OFT(**options)
