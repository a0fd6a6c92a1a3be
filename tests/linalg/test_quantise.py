"""The residual quantiser against plain uniform quantisation, and its gradients."""

from __future__ import annotations

import pytest
import torch

from vision_peft.linalg.quantise import clip_to_range, gated_quantise, residual_codes, residual_scales, straight_through_round

ONE = torch.ones((), dtype=torch.float64)


def test_scales_of_the_range_1():
    expected = [2 / 3, 2 / 15, 2 / 255, 2 / 65535, 2 / 4294967295]
    assert [float(scale) for scale in residual_scales(ONE, 5)] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("opened, bits", [(0, 2), (1, 4), (2, 8), (3, 16)])
@pytest.mark.parametrize("limit", [1.0, 0.3])
def test_hard_gates_are_plain_quantisation(opened, bits, limit):
    x = torch.randn(4000, dtype=torch.float64).mul(0.5)
    gates = (torch.arange(3) < opened).double()
    q = gated_quantise(x, limit * ONE, gates)
    step, clipped = 2 * limit / (2**bits - 1), x.clamp(-limit * (1 - 1e-7), limit * (1 - 1e-7))
    torch.testing.assert_close(q, step * (clipped / step).round(), rtol=0, atol=1e-9)
    assert (q - clipped).abs().max() <= step / 2 + 1e-12
    assert q.unique().numel() <= 2**bits
    assert torch.equal(gated_quantise(-x, limit * ONE, gates), -q)
    assert not gated_quantise(torch.zeros(3, dtype=torch.float64), limit * ONE, gates).any()


def test_a_closed_gate_closes_all_after_it():
    x = torch.randn(50, dtype=torch.float64)
    gates = torch.tensor([1.0, 0.0, 1.0]).double()
    torch.testing.assert_close(gated_quantise(x, ONE, gates), gated_quantise(x, ONE, gates[:1]), rtol=0, atol=0)


@pytest.mark.parametrize("gates", [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.3, 0.9, 0.5]])
def test_the_gradient_in_x_is_straight_through_and_in_the_range_where_clipped(gates):
    x = torch.tensor([0.31, -0.77, 0.0, 1.4, -2.0], dtype=torch.float64, requires_grad=True)
    gated_quantise(x, ONE, torch.tensor(gates).double()).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([1.0, 1, 1, 0, 0]).double(), rtol=0, atol=1e-9)
    limit = ONE.clone().requires_grad_()
    clip_to_range(torch.tensor([0.3, 1.4, 1.5, -2.0]).double(), limit).sum().backward()
    assert float(limit.grad) == pytest.approx(2 - 1, abs=1e-6)


def test_the_gradient_in_a_gate_is_what_it_lets_through():
    x = torch.randn(20, dtype=torch.float64).clamp(-0.9, 0.9)
    gates = torch.tensor([0.6, 0.5, 0.4], dtype=torch.float64, requires_grad=True)
    gated_quantise(x, ONE, gates).sum().backward()
    e4, e8, e16 = (float(code.sum()) for code in residual_codes(x, ONE, 4)[1:])
    expected = [e4 + 0.5 * (e8 + 0.4 * e16), 0.6 * (e8 + 0.4 * e16), 0.6 * 0.5 * e16]
    torch.testing.assert_close(gates.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_the_gradient_in_the_range_is_the_relative_error():
    """With straight-through rounding d Q / d limit = (Q - x) / limit for what is not clipped: the residual scales telescope."""
    x = torch.tensor([0.31, -0.77, 0.2, 0.55]).double()
    limit = ONE.clone().requires_grad_()
    q = gated_quantise(x, limit, torch.ones(1).double())
    q.sum().backward()
    assert float(limit.grad) == pytest.approx(float((q - x).sum().detach()), abs=1e-12)


def test_straight_through_round():
    x = torch.tensor([0.4, 0.5, 1.5, -2.6], requires_grad=True)
    y = straight_through_round(x)
    assert y.tolist() == [0, 0, 2, -3]
    y.sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1]
