"""PiSSA: the start is the best approximation, the offset is exact, and what all started adapters share."""

from __future__ import annotations

import math

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.pissa import PiSSA
from vision_peft.engine.install import attach, merge
from vision_peft.engine.peft_layout import save_peft
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-11}


def test_starts_at_the_identity():
    W = torch.randn(12, 9)
    torch.testing.assert_close(started(PiSSA(rank=3), W).weight(W), W, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
@pytest.mark.parametrize("alpha, scaling", [(3.0, "rank"), (8.0, "rank"), (2.0, "sqrt_rank")])
def test_the_start_is_the_best_approximation_whatever_the_scale(shape, alpha, scaling):
    W = weight64(*shape)
    adapter = started(PiSSA(rank=3, alpha=alpha, scaling=scaling), W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    product = (adapter.scale * adapter.B @ adapter.A).detach()
    torch.testing.assert_close(product, U[:, :3] * S[:3] @ Vh[:3], **EXACT)
    assert abs(float(torch.linalg.norm(W - product, 2)) - float(S[3])) < 1e-10


def test_the_factors_share_the_singular_values_evenly():
    W = weight64()
    adapter = started(PiSSA(rank=3, alpha=6.0), W)
    S = torch.linalg.svdvals(W)[:3]
    torch.testing.assert_close(adapter.B.mT @ adapter.B, torch.diag(S / 2), **EXACT)
    torch.testing.assert_close(adapter.A @ adapter.A.mT, torch.diag(S / 2), **EXACT)


def test_the_formula_after_training():
    """What the paper computes, residual + s B A, is the same map."""
    W = weight64()
    adapter = moved(PiSSA(rank=3, alpha=6.0), W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(adapter.weight(W), W - U[:, :3] * S[:3] @ Vh[:3] + 2 * adapter.B @ adapter.A, **EXACT)


def test_gradients_are_loras_and_none_at_the_start_is_zero():
    W, G = weight64(), weight64()
    adapter = started(PiSSA(rank=3, alpha=6.0), W)
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], 2 * G @ adapter.A.mT, **EXACT)
    torch.testing.assert_close(found["A"], 2 * adapter.B.mT @ G, **EXACT)
    assert found["A"].abs().min() > 0


def test_the_constant_part_is_marked_as_not_trained():
    W = weight64()
    form = moved(PiSSA(rank=3), W).factored(W)
    assert (form.B.shape, form.A.shape, form.trained) == ((12, 6), (6, 9), 3)


def test_gradients_through_a_layer():
    """The engine's path, which computes nothing for the constant part, against plain autograd."""
    network = nn.Sequential(nn.Linear(9, 12))
    adapter = attach(network, PiSSA(rank=3), "all").adapters["0"]
    with torch.no_grad():
        adapter.A.add_(0.1), adapter.B.add_(0.1)
    x, G = torch.randn(5, 9), torch.randn(5, 12)
    (network(x) * G).sum().backward()
    expected = gradients_of(adapter, network[0].weight.detach(), x, G)
    torch.testing.assert_close(adapter.A.grad, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.B.grad, expected[1], rtol=1e-4, atol=1e-5)


def gradients_of(adapter, W, x, G):
    A, B = adapter.A.detach().clone().requires_grad_(), adapter.B.detach().clone().requires_grad_()
    y = x @ (W + adapter.scale * (B @ A - adapter.B0 @ adapter.A0)).mT
    return torch.autograd.grad((y * G).sum(), (A, B))


def test_nothing_but_the_factors_is_saved_and_the_start_comes_back():
    W = torch.randn(12, 9)
    adapter = moved(PiSSA(rank=3), W)
    assert set(adapter.state_dict()) == {"A", "B"}
    other = started(PiSSA(rank=3), W, seed=5)
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other.weight(W), adapter.weight(W))


def test_the_mark_is_of_the_product():
    """Not of signs, nor of the basis inside equal singular values; another weight or another rank changes it."""
    W = weight64()
    adapter = started(PiSSA(rank=3), W)
    mark = adapter.fingerprint()
    turn = torch.linalg.qr(torch.randn(3, 3).double()).Q
    adapter.B0, adapter.A0 = adapter.B0 @ turn, turn.mT @ adapter.A0
    torch.testing.assert_close(adapter.fingerprint(), mark)
    assert not torch.allclose(started(PiSSA(rank=2), W).fingerprint(), mark, rtol=1e-3)
    assert not torch.allclose(started(PiSSA(rank=3), W.flip(0)).fingerprint(), mark, rtol=1e-3)


def test_a_weight_of_lower_rank_leaves_no_dead_pair():
    """A singular value of zero would be a pair of zeros, which no gradient can move."""
    W = weight64(12, 1) @ weight64(1, 9)
    adapter = started(PiSSA(rank=3), W)
    torch.testing.assert_close(adapter.weight(W), W, **EXACT)
    assert adapter.B.abs().amax(0).min() > 0
    assert adapter.A.abs().amax(1).min() > 0
    zero = started(PiSSA(rank=3), torch.zeros(12, 9))
    assert all(gradient.any() and gradient.isfinite().all() for gradient in gradients(zero, torch.zeros(12, 9), torch.ones(12, 9)).values())


def test_dropout_keeps_the_start_at_the_identity():
    """Both pairs see the same dropped inputs, so that they cancel while training too."""
    network = nn.Sequential(nn.Linear(9, 12))
    x = torch.randn(5, 9)
    before = network(x)
    attach(network, PiSSA(rank=3, dropout=0.5), "all")
    torch.testing.assert_close(network.train()(x), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha, rslora", [(3, False), (8, True)])
def test_against_the_layer_of_peft(alpha, rslora):
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(9, 12))
    W = network[0].weight.detach().clone()
    adapter = attach(network, PiSSA(rank=3, alpha=alpha, scaling="sqrt_rank" if rslora else "rank"), "all").adapters["0"]
    twin = nn.Sequential(nn.Linear(9, 12))
    twin.load_state_dict(network.state_dict())
    config = peft.LoraConfig(r=3, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"], init_lora_weights="pissa")
    layer = peft.get_peft_model(twin, config).base_model.model[0]
    A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    torch.testing.assert_close(B @ A, (adapter.B @ adapter.A).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight, W - adapter.scale * adapter.B0 @ adapter.A0, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for theirs, ours in ((A, adapter.A), (B, adapter.B)):
            theirs.add_(torch.randn_like(theirs))
            ours.copy_(theirs)
    x = torch.randn(4, 9)
    torch.testing.assert_close(network(x), layer(x), rtol=1e-4, atol=1e-5)


def test_exports_as_a_lora_of_twice_the_rank(tmp_path):
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    bare = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    bare.load_state_dict(network.state_dict())
    adapters = attach(network, PiSSA(rank=2), "all")
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_peft(tmp_path / "peft", network, base_model=None)
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path / "peft")
    assert loaded.peft_config["default"].r == 4
    x = torch.randn(3, 9)
    torch.testing.assert_close(loaded(x), network(x), rtol=1e-4, atol=1e-5)
    merge(network)
    torch.testing.assert_close(loaded(x), network(x), rtol=1e-4, atol=1e-5)


def test_counts():
    """768 x 768 at r = 8: LoRA's 12,288; the start is not trained."""
    assert PiSSA().count(site(768, 768)) == LoRA().count(site(768, 768)) == 12_288
    for shape in ((12, 9), (4, 2, 3, 3)):
        assert trainables(PiSSA(rank=3), site(*shape)) == PiSSA(rank=3).count(site(*shape))


def test_rank_of_the_change():
    W = weight64()
    assert torch.linalg.matrix_rank(delta(moved(PiSSA(rank=2), W), W)) == 4
    assert math.isclose(PiSSA(rank=4, alpha=8.0).scale, 2.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: 0"),
        ({"alpha": 0.0}, "alpha: 0.0 is not positive"),
        ({"alpha": -1.0}, "alpha: -1.0"),
        ({"scaling": "none"}, "scaling"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        PiSSA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        PiSSA(rank=10).adapter(site(12, 9), None)
