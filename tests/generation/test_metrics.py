"""Measures of generated pictures against plain computations and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import sobel
from torchmetrics.image.kid import poly_mmd

from vision_peft.generation.metrics import (
    diversity,
    diversity_ratio,
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


def test_diversity_ratio_is_one_unchanged_and_zero_collapsed():
    assert float(diversity_ratio(A, A)) == 1
    assert float(diversity_ratio(0.5 * A, A)) == pytest.approx(0.5)
    assert float(diversity_ratio(A[:1].repeat(4, 1), A)) == 0
    with pytest.raises(ValueError, match="all the same"):
        diversity_ratio(A, A[:1].repeat(4, 1))


@pytest.mark.parametrize("level", [0.0, 0.1, 0.3, 0.7, 0.9, 1.0])
def test_flat_pictures_have_no_edges_whatever_their_level(level):
    """Sobel's weights add up to 1e-17 there: without a floor the formula divides rounding by rounding."""
    flat = torch.full((1, 3, 8, 8), level)
    assert float(structure_sobel(flat, flat)) == 1
    assert float(structure_sobel(flat, torch.full((1, 3, 8, 8), 0.5))) == 1
    assert float(structure_sobel(flat, torch.rand(1, 3, 8, 8))) == 0


def test_the_faintest_step_of_an_8_bit_picture_is_an_edge():
    step = torch.full((1, 3, 8, 8), 0.5)
    step[..., 4:] += 1 / 255
    assert float(structure_sobel(step, step)) == pytest.approx(1)
    assert float(structure_sobel(step, torch.full_like(step, 0.5))) == 0


def test_structure_refuses_what_is_no_pairs():
    with pytest.raises(ValueError, match="pairs"):
        structure_sobel(torch.rand(1, 3, 8, 8), torch.rand(5, 3, 8, 8))


def test_fid_is_the_formula_with_a_matrix_root():
    x, y = torch.randn(60, 4, generator=DRAW).double(), 1.5 * torch.randn(50, 4, generator=DRAW).double()
    of_x, of_y = np.cov(x.numpy().T), np.cov(y.numpy().T)
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(of_x + of_y - 2 * sqrtm(of_x @ of_y).real)
    assert fid(x, y) == pytest.approx(expected, rel=1e-6)


def test_copies_cannot_be_told_where_training_is_one_picture():
    assert np.isnan(nearest_training(A, B[:1]).copied)
    assert np.isnan(nearest_training(A, B[:1].repeat(3, 1)).copied)
    assert nearest_training(B, torch.cat([B, B])).copied == 1, "a copy in training does not hide a copy of it"


@pytest.mark.parametrize(
    "measure",
    [
        lambda none: similarity(A, none),
        lambda none: subspace_distance(none, Subspace.of(B)),
        lambda none: diversity_ratio(none, A),
        lambda none: intra_cluster(none, B),
        lambda none: intra_cluster(A, none),
        lambda none: kid(none, A),
        lambda none: fid(A, none),
        lambda none: nearest_training(none, B),
        lambda none: nearest_training(A, none),
        lambda none: structure_sobel(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8)),
    ],
)
def test_every_measure_refuses_nothing(measure):
    with pytest.raises(ValueError, match="no pictures"):
        measure(A[:0])


def test_two_pictures_are_the_least():
    with pytest.raises(ValueError, match="at least two"):
        fid(A, B[:1])
    with pytest.raises(ValueError, match="at least two"):
        kid(torch.rand(1, 3), torch.rand(4, 3))
