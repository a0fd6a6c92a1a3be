"""Measures of generated pictures against plain computations and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import sobel
from torchmetrics.image.kid import poly_mmd

from vision_peft.generation.metrics import (
    diversity,
    fid,
    intra_cluster,
    kid,
    nearest_training,
    similarity,
    structure_sobel,
    subspace_distance,
)
from vision_peft.linalg.subspace import Subspace

DRAW = torch.Generator().manual_seed(0)
A, B = torch.randn(7, 12, generator=DRAW), torch.randn(5, 12, generator=DRAW)


def test_similarity_and_diversity_are_means_over_pairs():
    cosines = [float(a @ b / a.norm() / b.norm()) for a in A for b in B]
    assert float(similarity(A, B)) == pytest.approx(np.mean(cosines), abs=1e-6)
    distances = [float((A[i] - A[j]).norm()) for i in range(7) for j in range(i)]
    assert float(diversity(A)) == pytest.approx(np.mean(distances), abs=1e-6)


def test_distance_to_a_subspace():
    hull = Subspace.of(B)
    assert float(subspace_distance(A, hull)) == pytest.approx(float(hull.residual(A.double()).norm(dim=1).mean()))
    assert float(subspace_distance(B, hull)) < 1e-6


def test_clusters_are_those_of_the_nearest_reference():
    references = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    generated = torch.tensor([[0.0, 1.0], [0.0, -1.0], [10.0, 1.0], [10.0, 5.0], [10.0, -2.0], [0.0, 9.0]])
    first, second = 2.0, np.mean([4.0, 3.0, 7.0])
    assert float(intra_cluster(generated, references)) == pytest.approx((first + second) / 2)
    assert torch.isnan(intra_cluster(generated[[0, 2, 5]], references))


def test_structure_is_the_formula_on_sobels_edges():
    source, adapted = torch.rand(2, 3, 9, 11, generator=DRAW), torch.rand(2, 3, 9, 11, generator=DRAW)

    def edges(image: torch.Tensor) -> np.ndarray:
        grey = np.tensordot([0.299, 0.587, 0.114], image.numpy().astype(np.float64), 1)
        return np.hypot(sobel(grey, 0, mode="nearest"), sobel(grey, 1, mode="nearest"))

    for index, found in enumerate(structure_sobel(source, adapted)):
        p, q = edges(source[index]), edges(adapted[index])
        assert float(found) == pytest.approx(2 * (p * q).sum() / ((p**2).sum() + (q**2).sum()), abs=1e-6)
    torch.testing.assert_close(structure_sobel(source, source), torch.ones(2, dtype=torch.float64))
    black = torch.zeros(1, 3, 8, 8)
    assert float(structure_sobel(black, black)) == 1 and float(structure_sobel(black, source[:1, :, :8, :8])) == 0


def test_kid_is_torchmetrics_for_equal_numbers_and_unbiased_for_few():
    x, y = torch.randn(20, 8, generator=DRAW), torch.randn(20, 8, generator=DRAW) + 0.3
    m = 20  # torchmetrics divides the mixed term by m^2, too
    assert kid(x, y) == pytest.approx(float(poly_mmd(x.double(), y.double())), rel=1e-6), m
    draws = [kid(torch.randn(6, 8, generator=DRAW), torch.randn(9, 8, generator=DRAW)) for _ in range(400)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / 20


def test_fid_of_two_gaussians():
    x, y = torch.randn(4000, 3, generator=DRAW), 2 * torch.randn(4000, 3, generator=DRAW) + 1
    assert fid(x, y) == pytest.approx(3 * 1 + 3 * (2 - 1) ** 2, rel=0.1)
    assert fid(x, x) == pytest.approx(0, abs=1e-6)


def test_copies_are_told_from_pictures_of_the_same_kind():
    training = torch.eye(4, 10) + 0.1
    copies = nearest_training(training[[2, 0]] * 3, training)
    assert copies.index.tolist() == [2, 0] and copies.copied == 1
    torch.testing.assert_close(copies.cosine, torch.ones(2, dtype=torch.float64))
    assert nearest_training(torch.eye(10)[5:7], training).copied == 0


def test_nothing_has_no_measure():
    with pytest.raises(ValueError, match="no pictures"):
        similarity(A[:0], B)
    with pytest.raises(ValueError, match="at least two"):
        diversity(A[:1])
    with pytest.raises(ValueError, match="at least two"):
        kid(A[:1], B)
