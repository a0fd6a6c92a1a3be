"""Thresholds and hard-concrete gates against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from vision_peft.linalg.gates import nested, open_probability, sample_gates, settled_gates, shrink_then_cut, soft_threshold

X = [0.3, 0.15, 0.1, -0.05, -0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_threshold(dtype):
    expected = torch.tensor([0.2, 0.05, 0, 0, -0.15], dtype=dtype)
    torch.testing.assert_close(soft_threshold(torch.tensor(X, dtype=dtype), 0.1), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_official_variant(dtype):
    """Zero below twice the threshold; the entry exactly at it stays."""
    expected = torch.tensor([0.2, 0, 0.1, 0, -0.15], dtype=dtype)
    torch.testing.assert_close(shrink_then_cut(torch.tensor(X, dtype=dtype), 0.1), expected, rtol=1e-6, atol=1e-8)
    x = torch.tensor([-0.15, -0.2, 0.05, 0.2, -0.1], dtype=dtype)
    torch.testing.assert_close(shrink_then_cut(x, 0.1), torch.tensor([0, -0.1, 0, 0.1, -0.1], dtype=dtype), rtol=1e-6, atol=1e-8)


def test_thresholds_agree_beyond_twice_the_threshold():
    x = torch.randn(1000, dtype=torch.float64)
    far = x.abs() > 0.4
    assert torch.equal(soft_threshold(x, 0.2)[far], shrink_then_cut(x, 0.2)[far])
    assert not shrink_then_cut(x, 0.2)[~far].any()
    assert torch.equal(soft_threshold(x, 0.0), x)
    assert torch.equal(shrink_then_cut(x, 0.0), x)


def test_soft_threshold_is_the_proximal_map():
    """argmin of 1/2 (z - x)^2 + t |z| over a fine grid; the size is max(|x| - t, 0)."""
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    for x in (-2.3, -0.4, 0.0, 0.7, 1.9):
        best = grid[(0.5 * (grid - x).square() + 0.5 * grid.abs()).argmin()]
        torch.testing.assert_close(soft_threshold(torch.tensor(x).double(), 0.5), best, rtol=0, atol=2e-4)
        assert abs(float(soft_threshold(torch.tensor(x).double(), 0.5))) == pytest.approx(max(abs(x) - 0.5, 0))


@pytest.mark.parametrize("phi, q", [(1.0, 0.93077), (0.3, 0.86973), (-0.5, 0.75000), (0.8, 0.91672), (6.0, 0.9995), (-0.935, 0.66)])
def test_open_probability(phi, q):
    assert float(open_probability(torch.tensor(phi, dtype=torch.float64))) == pytest.approx(q, abs=6e-6 if phi < 6 and phi > -0.9 else 1e-4)


def test_evaluation_flips_at_minus_0_935():
    assert settled_gates(torch.tensor([-0.95, -0.90, 6.0, -6.0])).tolist() == [0, 1, 1, 0]
    assert not settled_gates(torch.zeros(2, requires_grad=True)).requires_grad


def test_samples_have_the_probability_and_follow_the_formula():
    phi = torch.tensor([-1.0, 0.0, 1.5], dtype=torch.float64)
    torch.manual_seed(4)
    z = sample_gates(phi.expand(50_000, 3))
    torch.manual_seed(4)
    u = torch.rand(50_000, 3, dtype=torch.float64)
    by_hand = (1 / (1 + torch.exp(-(u.log() - (1 - u).log() + phi) * 1.5)) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(z, by_hand, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((z > 0).double().mean(0), open_probability(phi), rtol=0, atol=0.01)
    assert z.min() == 0 and z.max() == 1


def test_samples_pass_a_gradient_where_they_are_not_saturated():
    phi = torch.zeros(1000, requires_grad=True)
    z = sample_gates(phi)
    z.sum().backward()
    inside = (z > 0) & (z < 1)
    assert 100 < int(inside.sum()) < 900
    assert (phi.grad[inside] > 0).all()
    assert not phi.grad[~inside].any()


def test_nested_gates_form_a_prefix_and_pass_gradients_through_zeros():
    gates = torch.tensor([0.5, 0.8, 0.0, 1.0], requires_grad=True)
    chain = nested(gates)
    torch.testing.assert_close(chain, torch.tensor([0.5, 0.4, 0.0, 0.0]))
    chain.sum().backward()
    torch.testing.assert_close(gates.grad, torch.tensor([1 + 0.8, 0.5, 0.4 + 0.4, 0.0]))
