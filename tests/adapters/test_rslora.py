"""rsLoRA: LoRA's map at another scale, and the claim that the scale makes the rank harmless."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.rslora import RsLoRA
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def filled(method, W, like):
    """The method's adapter with the factors of another."""
    adapter = started(method, W)
    with torch.no_grad():
        adapter.A.copy_(like.A), adapter.B.copy_(like.B)
    return adapter


def test_starts_at_the_identity_with_the_factors_of_lora():
    W = torch.randn(12, 9)
    adapter = started(RsLoRA(rank=3), W)
    assert torch.equal(adapter.weight(W), W)
    assert torch.equal(adapter.A, started(LoRA(rank=3), W).A)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_formula(rank):
    W = weight64()
    adapter = moved(RsLoRA(rank=rank, alpha=3.0), W)
    torch.testing.assert_close(delta(adapter, W), 3 / rank**0.5 * (adapter.B @ adapter.A).detach(), **EXACT)


@pytest.mark.parametrize("other", [LoRA(rank=4, alpha=3.0, scaling="sqrt_rank"), LoRA(rank=4, alpha=3.0 * 4**0.5)])
def test_two_ways_to_say_it_with_lora(other):
    W = weight64()
    adapter = moved(RsLoRA(rank=4, alpha=3.0), W)
    torch.testing.assert_close(delta(filled(other, W, adapter), W), delta(adapter, W), **EXACT)


def test_at_rank_one_it_is_lora():
    W = weight64()
    adapter = moved(RsLoRA(rank=1, alpha=3.0), W)
    torch.testing.assert_close(delta(filled(LoRA(rank=1, alpha=3.0), W, adapter), W), delta(adapter, W), **EXACT)


def test_gradients():
    W, G = weight64(), weight64()
    adapter, s = moved(RsLoRA(rank=4, alpha=3.0), W), 3 / 4**0.5
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], s * G @ adapter.A.mT, **EXACT)
    torch.testing.assert_close(found["A"], s * adapter.B.mT @ G, **EXACT)


def test_the_first_step_of_gradient_descent_does_not_depend_on_the_rank():
    """|s^2 G A^T A| with A of r random rows: s^2 times a sum of r terms. LoRA's shrinks by 64 from rank 1 to rank 64."""
    W, G = torch.randn(200, 300), torch.randn(200, 300)
    sizes = {}
    for name, make in {"rs": lambda r: RsLoRA(rank=r, alpha=1.0), "plain": lambda r: LoRA(rank=r, alpha=1.0)}.items():
        for rank in (4, 64):
            adapter = started(make(rank), W)
            B = -gradients(adapter, W, G)["B"]
            projected = adapter.scale * B @ adapter.A.detach()
            sizes[name, rank] = float((projected * G).sum())  # first-order change of the loss
    assert sizes["rs", 64] / sizes["rs", 4] == pytest.approx(1.0, rel=0.15)
    assert sizes["plain", 64] / sizes["plain", 4] == pytest.approx(1 / 16, rel=0.15)


def test_counts():
    """As LoRA: 12,288 for 768 x 768 at r = 8; 184,320 on CLIP ViT-B/16 at r = 2."""
    assert RsLoRA(rank=8).count(site(768, 768)) == 12_288
    assert count(RsLoRA(rank=2), clip_vit_b16()) == 184_320
    for shape in ((12, 9), (4, 2, 3, 3)):
        assert trainables(RsLoRA(rank=3), site(*shape)) == RsLoRA(rank=3).count(site(*shape))


def test_its_arguments_are_those_that_rebuild_it():
    assert RsLoRA(rank=4, alpha=2.0, dropout=0.1).hyperparameters() == {"rank": 4, "alpha": 2.0, "dropout": 0.1}


def test_against_the_layer_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["0"])
    network = peft.get_peft_model(nn.Sequential(nn.Linear(9, 12)), config)
    layer, W = network.base_model.model[0], torch.randn(12, 9)
    adapter = moved(RsLoRA(rank=4, alpha=3.0), W)
    layer.lora_A["default"].weight.data.copy_(adapter.A.data)
    layer.lora_B["default"].weight.data.copy_(adapter.B.data)
    torch.testing.assert_close(delta(adapter, W), layer.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options, message", [({"rank": 0}, "rank: 0"), ({"dropout": 1.0}, "dropout: 1.0")])
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        RsLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        RsLoRA(rank=10).adapter(site(12, 9), None)
