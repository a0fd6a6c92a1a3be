"""Whitening against its definition."""

from __future__ import annotations

import pytest
import torch

from vision_peft.linalg.whitening import Whitening

DRAW = torch.Generator().manual_seed(0)
VECTORS = torch.randn(200, 6, generator=DRAW).double() * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1, 0.0]) + 2


def test_a_small_shrinkage_makes_what_varies_vary_alike():
    mapped = Whitening.of(VECTORS, 1e-6)(VECTORS)
    values = torch.linalg.eigvalsh(mapped.mT @ mapped / len(mapped))
    assert values[1:].max() < 1.05 * values[1:].min() and values[0] < 1e-6, "what does not vary still does not"
    torch.testing.assert_close(mapped.mean(0), torch.zeros(6, dtype=torch.float64))
    assert float(mapped.square().sum(1).mean()) == pytest.approx(1)


def test_a_large_shrinkage_only_centres():
    centred = VECTORS - VECTORS.mean(0)
    expected = centred / centred.square().sum(1).mean().sqrt()
    torch.testing.assert_close(Whitening.of(VECTORS, 1e8)(VECTORS), expected, rtol=1e-5, atol=1e-6)


def test_a_direction_without_variance_counts_most():
    T = Whitening.of(VECTORS, 0.1)
    steps = T(torch.eye(6, dtype=torch.float64)) - T(torch.zeros(6, dtype=torch.float64))
    assert steps.norm(dim=1).argsort().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [4, 200])
def test_the_map_is_the_root_of_the_covariance(count):
    vectors, shrinkage = VECTORS[:count, :5], 0.3
    centred = vectors - vectors.mean(0)
    values, rows = torch.linalg.eigh(centred.mT @ centred / count)
    mean = values.sum() / min(5, count - 1)
    expected = centred @ (rows @ ((values.clamp(min=0) / mean + shrinkage) ** -0.5 * rows).mT)
    expected = expected / expected.square().sum(1).mean().sqrt()
    torch.testing.assert_close(Whitening.of(vectors, shrinkage)(vectors), expected)


@pytest.mark.parametrize("vectors, shrinkage", [(torch.ones(5, 3), 1.0), (torch.randn(1, 3), 1.0), (torch.randn(5, 3), 0.0)])
def test_what_cannot_be_whitened(vectors, shrinkage):
    with pytest.raises(ValueError, match="whitening needs"):
        Whitening.of(vectors, shrinkage)
