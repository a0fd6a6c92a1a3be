"""WaRA over tokens: the 2-D transform with dense matrices, LoRA at equal gains, and which tokens make the grid."""

from __future__ import annotations

import pytest
import torch
from fakes import site, trainables
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.wara_tokens import WaRATokens
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.install import attach, merge
from vision_peft.errors import UserError
from vision_peft.linalg.wavelet import dwt_matrix

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def layer(gains=None, **options):
    """An adapter on a 5 x 6 layer as if trained, with the layer's W and b."""
    adapter = WaRATokens(**{"rank": 3, "alpha": 6.0} | options).adapter(site(5, 6), None)
    W, b = torch.randn(5, 6), torch.randn(5)
    with torch.no_grad():
        adapter.initialize(W, Evidence(torch.Generator().manual_seed(0)))
        adapter.B.normal_()
        adapter.gains.copy_(torch.tensor(gains if gains else [0.5, 2.0, -1.0, 3.0]))
    return adapter, W, b


def by_hand(adapter, image, wavelet):
    """image (h, w, d) -> branch output (h, w, 5): transform of the input itself, the pair on every subband, inverse transform."""
    h, w, d = image.shape
    padded = torch.zeros(h + h % 2, w + w % 2, d, dtype=torch.float64)
    padded[:h, :w] = image
    rows, cols = dwt_matrix(padded.shape[0], wavelet), dwt_matrix(padded.shape[1], wavelet)
    C = torch.einsum("ah,bw,hwd->abd", rows, cols, padded)
    half_h, half_w = C.shape[0] // 2, C.shape[1] // 2
    g = adapter.gains.detach().double()
    C[:half_h, :half_w] *= g[0]
    C[:half_h, half_w:] *= g[1]
    C[half_h:, :half_w] *= g[2]
    C[half_h:, half_w:] *= g[3]
    C = C @ (adapter.B @ adapter.A).detach().double().mT
    return adapter.scale * torch.einsum("ah,bw,abd->hwd", rows, cols, C)[:h, :w]


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("h, w", [(4, 6), (5, 5), (2, 3), (1, 1)])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_the_formula(h, w, first, wavelet):
    """Odd sides, class token and registers included."""
    adapter, W, b = layer(grid=[h, w], wavelet=wavelet)
    x = torch.randn(2, first + h * w, 6)
    y = adapter.linear(x, W, b).detach() - (x @ W.mT + b)
    torch.testing.assert_close(y[:, :first], 2 * x[:, :first] @ (adapter.B @ adapter.A).detach().mT, **CLOSE)
    for each, out in zip(x, y):
        expected = by_hand(adapter, each[first:].double().view(h, w, 6), wavelet)
        torch.testing.assert_close(out[first:].double().view(h, w, 5), expected, **CLOSE)


def test_an_image_needs_no_grid():
    adapter, W, b = layer()
    x = torch.randn(2, 3, 4, 6)
    flat, _, _ = layer(grid=[3, 4])
    flat.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(adapter.linear(x, W, b).flatten(1, 2), flat.linear(x.flatten(1, 2), W, b), **CLOSE)


def test_a_single_vector_is_a_grid_of_one():
    """Padded to 2 x 2 its haar bands are all x / 2, so the branch is that of LoRA times the mean gain."""
    adapter, W, b = layer()
    x = torch.randn(7, 6)
    expected = x @ W.mT + b + 2 * 4.5 / 4 * x @ (adapter.B @ adapter.A).mT
    torch.testing.assert_close(adapter.linear(x, W, b), expected, **CLOSE)
    torch.testing.assert_close(adapter.linear(x[0], W, b), expected[0], **CLOSE)


def test_equal_gains_are_lora():
    adapter, W, b = layer(gains=[1.0] * 4, wavelet="db2")
    lora = LoRA(rank=3, alpha=6.0).adapter(site(5, 6), None)
    with torch.no_grad():
        lora.A.copy_(adapter.A), lora.B.copy_(adapter.B)
    x = torch.randn(2, 17, 6)
    torch.testing.assert_close(adapter.linear(x, W, b), x @ lora.weight(W).mT + b, **CLOSE)


def test_low_pass_alone_blurs():
    """Without the other bands every patch of a 2 x 2 block gets the same, whatever W x is; the class token is left out."""
    adapter, W, b = layer(gains=[1.0, 0.0, 0.0, 0.0])
    x = torch.randn(2, 17, 6)
    change = (adapter.linear(x, W, b) - (x @ W.mT + b))[:, 1:].detach().view(2, 4, 4, 5)
    torch.testing.assert_close(change[:, 0::2, 0::2], change[:, 1::2, 1::2], **CLOSE)
    torch.testing.assert_close(change[:, 0::2, 1::2], change[:, 1::2, 0::2], **CLOSE)
    assert (change[:, 0, 0] - change[:, 0, 2]).abs().max() > 0.01


@pytest.mark.parametrize("tokens, sides", [(16, (4, 4)), (17, (4, 4)), (197, (14, 14)), (196, (14, 14)), (1, (1, 1)), (2, (1, 1))])
def test_squares(tokens, sides):
    assert layer()[0].sides(tokens) == sides


@pytest.mark.parametrize("tokens", [6, 77, 261])
def test_what_is_no_square_is_refused(tokens):
    """77: a text; 261: DINOv2 with a class token and four registers, which needs grid: [16, 16]."""
    with pytest.raises(UserError, match=f"grid: {tokens} tokens of vision.0.attn.q are no square"):
        layer()[0].sides(tokens)
    assert layer(grid=[2, 3])[0].sides(tokens) == (2, 3)


def test_a_grid_that_is_larger_than_the_sequence():
    adapter, W, b = layer(grid=[4, 4])
    with pytest.raises(UserError, match="grid: 4 x 4 patches are more than the 15 tokens"):
        adapter.linear(torch.randn(1, 15, 6), W, b)


def test_half_precision_keeps_the_type():
    adapter, W, b = layer()
    x = torch.randn(2, 17, 6)
    y = adapter.linear(x.bfloat16(), W.bfloat16(), b.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), adapter.linear(x, W, b), rtol=0.05, atol=0.3)


def test_gains_are_not_decayed_and_train_after_the_first_step():
    network = nn.Sequential(nn.Linear(6, 5))
    adapters = attach(network, WaRATokens(rank=2), "all")
    factors, gains = adapters.param_groups(0.1)
    assert (len(factors["params"]), len(gains["params"]), gains["weight_decay"]) == (2, 1, 0.0)
    optimizer, x = torch.optim.AdamW(adapters.param_groups(0.1), lr=0.1, weight_decay=0.5), torch.randn(3, 17, 6)
    for step in range(2):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        assert bool(gains["params"][0].grad.any()) == (step > 0)
        optimizer.step()
    assert len(gains["params"][0].detach().unique()) > 1


def test_it_cannot_be_merged():
    network = nn.Sequential(nn.Linear(6, 5))
    attach(network, WaRATokens(rank=2), "all")
    with pytest.raises(UserError, match="wara_tokens cannot be merged"):
        merge(network)


def test_counts_and_sites():
    assert WaRATokens(rank=8).count(site(768, 768)) == 12_292
    assert trainables(WaRATokens(rank=3), site(12, 9)) == WaRATokens(rank=3).count(site(12, 9)) == 67
    assert WaRATokens().suits(site(12, 9))
    assert not WaRATokens().suits(site(12, 3, 4, 4, kind="conv"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"grid": [4]}, r"grid: \[4\] is not two positive"),
        ({"grid": [4, 0]}, r"grid: \[4, 0\]"),
        ({"wavelet": "db9"}, "wavelet: unknown wavelet 'db9'; did you mean db"),
        ({"rank": 0}, "rank: 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        WaRATokens(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        WaRATokens(rank=10).adapter(site(12, 9), None)
