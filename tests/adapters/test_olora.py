"""OLoRA: a start from the QR decomposition, and no scale in it."""

from __future__ import annotations

import pytest
import torch
from fakes import gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.olora import OLoRA
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-11}


def test_starts_at_the_identity():
    W = torch.randn(12, 9)
    torch.testing.assert_close(started(OLoRA(rank=3), W).weight(W), W, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_the_start_is_the_head_of_the_whole_qr(shape, rank):
    W = weight64(*shape)
    adapter = started(OLoRA(rank=rank, alpha=5.0), W)
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close(adapter.B.abs(), Q[:, :rank].abs(), **EXACT)
    torch.testing.assert_close(adapter.A.abs(), R[:rank].abs(), **EXACT)
    torch.testing.assert_close(adapter.B @ adapter.A, Q[:, :rank] @ R[:rank], **EXACT)


def test_b_is_orthonormal_and_a_triangular():
    adapter = started(OLoRA(rank=4), weight64())
    torch.testing.assert_close(adapter.B.mT @ adapter.B, torch.eye(4).double(), **EXACT)
    assert adapter.A[:, :4].tril(-1).abs().max() < 1e-12


def test_the_start_reproduces_the_first_columns():
    """B0 A0 projects W on the span of its first r columns, which it therefore holds exactly."""
    W = weight64()
    adapter = started(OLoRA(rank=4), W)
    torch.testing.assert_close((adapter.B @ adapter.A)[:, :4], W[:, :4], **EXACT)


def test_there_is_no_scale_in_the_start():
    W = weight64()
    one, other = started(OLoRA(rank=3, alpha=3.0), W), started(OLoRA(rank=3, alpha=30.0), W)
    assert torch.equal(one.A, other.A)
    assert torch.equal(one.B, other.B)
    assert OLoRA(rank=3, alpha=0.0).scale == 0  # nothing is divided by it


def test_the_formula_after_training():
    W = weight64()
    adapter = moved(OLoRA(rank=3, alpha=6.0), W)
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close(adapter.weight(W), W - 2 * Q[:, :3] @ R[:3] + 2 * adapter.B @ adapter.A, **EXACT)


def test_gradients():
    W, G = weight64(), weight64()
    adapter = started(OLoRA(rank=3, alpha=6.0), W)
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], 2 * G @ adapter.A.mT, **EXACT)
    torch.testing.assert_close(found["A"], 2 * adapter.B.mT @ G, **EXACT)


def test_a_weight_whose_first_columns_are_zero():
    W = weight64()
    W[:, :3] = 0
    adapter = started(OLoRA(rank=3), W)
    torch.testing.assert_close(adapter.weight(W), W, **EXACT)
    assert all(gradient.any() for gradient in gradients(adapter, W, weight64()).values())


@pytest.mark.parametrize("alpha", [3, 9])
def test_against_the_layer_of_peft(alpha):
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(9, 12))
    adapter = attach(network, OLoRA(rank=3, alpha=alpha), "all").adapters["0"]
    twin = nn.Sequential(nn.Linear(9, 12))
    twin.load_state_dict(network.state_dict())
    config = peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=["0"], init_lora_weights="olora")
    layer = peft.get_peft_model(twin, config).base_model.model[0]
    A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    torch.testing.assert_close(B @ A, (adapter.B @ adapter.A).detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for theirs, ours in ((A, adapter.A), (B, adapter.B)):
            theirs.add_(torch.randn_like(theirs))
            ours.copy_(theirs)
    x = torch.randn(4, 9)
    torch.testing.assert_close(network(x), layer(x), rtol=1e-4, atol=1e-5)


def test_the_start_is_recomputed_and_marked():
    W = weight64()
    adapter = started(OLoRA(rank=3), W)
    assert set(adapter.state_dict()) == {"A", "B"}
    torch.testing.assert_close(started(OLoRA(rank=3), W, seed=4).fingerprint(), adapter.fingerprint())
    assert not torch.allclose(started(OLoRA(rank=3), W.flip(1)).fingerprint(), adapter.fingerprint(), rtol=1e-3)


def test_counts():
    assert OLoRA().count(site(768, 768)) == 12_288
    assert trainables(OLoRA(rank=3), site(4, 2, 3, 3)) == OLoRA(rank=3).count(site(4, 2, 3, 3)) == 66


@pytest.mark.parametrize("options, message", [({"rank": 0}, "rank: 0"), ({"scaling": "x"}, "scaling"), ({"dropout": 1.0}, "dropout")])
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        OLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        OLoRA(rank=10).adapter(site(12, 9), None)
