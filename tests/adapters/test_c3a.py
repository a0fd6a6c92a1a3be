"""C3A: circulant blocks, by loops, by Fourier transform and by the layer of PEFT."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.c3a import C3A
from vision_peft.engine.install import attach
from vision_peft.errors import UserError


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 8)
    assert torch.equal(started(C3A(), W).weight(W), W)


@pytest.mark.parametrize("shape, block", [((12, 8), 4), ((8, 12), 2), ((6, 6), 6), ((5, 7), 1)])
def test_the_formula(shape, block):
    W = weight64(*shape)
    adapter, C = moved(C3A(block), W), torch.zeros(shape).double()
    w = adapter.w.detach()
    for row in range(shape[0]):
        for column in range(shape[1]):
            C[row, column] = w[row // block, column // block, (column % block - row % block) % block]
    torch.testing.assert_close(delta(adapter, W), C / shape[1], rtol=0, atol=1e-14)


def test_one_block_is_a_circular_correlation():
    """y_i = sum_j w_(j - i) x_j: a product of Fourier transforms."""
    W, x = weight64(10, 10), torch.randn(10).double()
    adapter = moved(C3A(), W)
    w = adapter.w.detach()[0, 0]
    expected = torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(w).conj()).real / 10
    torch.testing.assert_close(delta(adapter, W) @ x, expected, rtol=0, atol=1e-12)


def test_gradient_by_hand():
    """dL/dw_t is the sum of G over the places that hold w_t, divided by n."""
    W, G = weight64(12, 8), weight64(12, 8)
    found, expected = gradients(moved(C3A(4), W), W, G)["w"], torch.zeros(3, 2, 4).double()
    for row in range(12):
        for column in range(8):
            expected[row // 4, column // 4, (column - row) % 4] += G[row, column] / 8
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_circulant_blocks_commute():
    W = weight64(8, 8)
    one, two = moved(C3A(), W), moved(C3A(), W)
    C, D = delta(one, W), delta(two, W)
    torch.testing.assert_close(C @ D, D @ C, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(C) == 8, "few numbers, but full rank"


@pytest.mark.parametrize("out, columns", [(8, 8), (12, 8), (8, 12)])
def test_against_the_layer_of_peft(out, columns):
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(columns, out))
    adapter = attach(network, C3A(4), "all").adapters["0"]
    nn.init.normal_(adapter.w)
    twin = nn.Sequential(nn.Linear(columns, out))
    twin.load_state_dict(network.state_dict())
    twin = peft.get_peft_model(twin, peft.C3AConfig(block_size=4, target_modules=["0"]))
    kernel = twin.base_model.model[0].c3a_kernel["default"]
    kernel.data.copy_(adapter.w)
    x = torch.randn(4, columns)
    ours, theirs = network(x), twin(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours.square().sum().backward(), theirs.square().sum().backward()
    torch.testing.assert_close(adapter.w.grad, kernel.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shape, most, block", [((768, 768), 256, 256), ((384, 1536), 256, 192), ((384, 588), 256, 12), ((64, 9), 256, 1), ((20, 12), 3, 2)]
)
def test_the_block_is_the_largest_common_divisor_allowed(shape, most, block):
    assert C3A(most).block(site(*shape)) == block
    assert C3A(most).count(site(*shape)) == shape[0] * shape[1] // block


def test_counts():
    """768 x 768: 2,304 at b = 256; 768 at b = 768."""
    assert C3A().count(site(768, 768)) == 2_304
    assert C3A(768).count(site(768, 768)) == 768
    for shape in ((12, 9), (4, 2, 3, 3)):
        assert trainables(C3A(4), site(*shape)) == C3A(4).count(site(*shape))


@pytest.mark.parametrize("block_size", [0, -4])
def test_bad_options(block_size):
    with pytest.raises(UserError, match=f"adapter.method.block_size: {block_size} is not positive"):
        C3A(block_size)
