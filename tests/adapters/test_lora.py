"""LoRA against its formula written out, its start, its scale, and the counts of the CLIP few-shot protocol."""

from __future__ import annotations

import math

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.engine.install import attach
from vision_peft.errors import UserError


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    assert torch.equal(started(LoRA(rank=3), W).weight(W), W)


def test_start_of_a_is_kaimings():
    A = started(LoRA(rank=8), torch.zeros(8, 400, dtype=torch.float64)).A
    bound = 1 / math.sqrt(400)
    assert A.abs().max() <= bound
    assert abs(float(A.detach().var()) / (bound**2 / 3) - 1) < 0.1


@pytest.mark.parametrize(
    "rank, alpha, scaling, scale",
    [(4, 3.0, "sqrt_rank", 1.5), (2, 1.0, "sqrt_rank", 0.5**0.5), (8, 8.0, "rank", 1.0), (4, 3.0, "rank", 0.75)],
)
def test_delta_is_s_b_a(rank, alpha, scaling, scale):
    W = weight64()
    adapter = moved(LoRA(rank=rank, alpha=alpha, scaling=scaling), W)
    torch.testing.assert_close(delta(adapter, W), scale * adapter.B @ adapter.A, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(delta(adapter, W)) == rank


def test_rank_one_is_the_same_under_both_scalings():
    assert LoRA(rank=1, alpha=3.0).scale == LoRA(rank=1, alpha=3.0, scaling="sqrt_rank").scale == 3.0


def test_gradients():
    """dL/dB = s G A^T, dL/dA = s B^T G; at the start the gradient of A is zero and that of B is not."""
    W, G = weight64(), weight64()
    adapter, s = moved(LoRA(rank=3, alpha=2.0), W), 2 / 3
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], s * G @ adapter.A.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["A"], s * adapter.B.mT @ G, rtol=0, atol=1e-12)
    fresh = gradients(started(LoRA(rank=3), W), W, G)
    assert not fresh["A"].any()
    assert fresh["B"].all()


def test_a_convolution_is_a_thin_convolution_and_a_pointwise_one():
    """Flattened kernels: A is a k x k convolution to r channels, B a 1 x 1 convolution."""
    network = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1))
    adapter = attach(network, LoRA(rank=2, alpha=4.0), "conv").adapters["0"]
    nn.init.normal_(adapter.B)
    x = torch.randn(2, 3, 8, 8)
    low = nn.functional.conv2d(x, adapter.A.view(2, 3, 3, 3), stride=2, padding=1)
    branch = nn.functional.conv2d(low, adapter.B.view(6, 2, 1, 1))
    torch.testing.assert_close(
        network(x), network[0]._conv_forward(x, network[0].weight, network[0].bias) + 2 * branch, rtol=1e-4, atol=1e-5
    )


def test_against_the_layer_of_peft():
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(7, 5))
    adapter = attach(network, LoRA(rank=2, alpha=3.0), "all").adapters["0"]
    nn.init.normal_(adapter.B)
    twin = nn.Sequential(nn.Linear(7, 5))
    twin.load_state_dict(network.state_dict())
    twin = peft.get_peft_model(twin, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    layer = twin.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(adapter.A.data)
    layer.lora_B["default"].weight.data.copy_(adapter.B.data)
    x = torch.randn(4, 7)
    torch.testing.assert_close(network(x), twin(x))


def test_counts():
    """CLIP ViT-B/16, q, k, v of both towers, r = 2: 184,320; one 768 x 768 matrix: 3,072, or 12,288 at r = 8."""
    assert count(LoRA(rank=2), clip_vit_b16()) == 184_320
    assert LoRA(rank=2).count(site(768, 768)) == 3_072
    assert LoRA().count(site(768, 768)) == 12_288
    for shape in ((12, 9), (4, 2, 3, 3), (20, 8)):
        assert trainables(LoRA(rank=3), site(*shape)) == LoRA(rank=3).count(site(*shape))


@pytest.mark.parametrize("rank", [10, 13])
def test_a_rank_that_does_not_fit(rank):
    with pytest.raises(UserError, match=rf"rank: {rank} does not fit vision\.0\.attn\.q, a 12 x 9 matrix \(1 to 9\)"):
        LoRA(rank=rank).adapter(site(12, 9), None)
    LoRA(rank=9).adapter(site(12, 9), None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: 0"),
        ({"rank": -2, "scaling": "sqrt_rank"}, "rank: -2"),
        ({"scaling": "sqrt"}, "scaling: 'sqrt' is not one of rank, sqrt_rank"),
        ({"dropout": 1.0}, r"dropout: 1.0 is not in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LoRA(**options)
