"""Hulls of a few vectors: the properties that the loss of hybrid domain adaptation leans on."""

from __future__ import annotations

import pytest
import torch

from vision_peft.linalg.subspace import Subspace

DRAW = torch.Generator().manual_seed(0)
VECTORS = torch.randn(6, 40, generator=DRAW, dtype=torch.float64)
QUERIES = torch.randn(9, 40, generator=DRAW, dtype=torch.float64)


@pytest.mark.parametrize("kind, directions", [("affine", 5), ("linear", 6)])
def test_it_is_a_projection_that_keeps_the_references(kind, directions):
    hull = Subspace.of(VECTORS, kind)
    assert hull.basis.shape == (directions, 40)
    torch.testing.assert_close(hull.basis @ hull.basis.mT, torch.eye(directions, dtype=torch.float64))
    torch.testing.assert_close(hull.project(VECTORS), VECTORS)
    torch.testing.assert_close(hull.project(hull.project(QUERIES)), hull.project(QUERIES))
    assert (hull.residual(QUERIES) @ hull.basis.mT).abs().max() < 1e-10


def test_the_distance_is_that_of_least_squares():
    """min over weights that sum to one of |f - sum w_j f_j|."""
    A = (VECTORS[1:] - VECTORS[0]).mT
    fitted = VECTORS[0] + (A @ torch.linalg.lstsq(A, (QUERIES - VECTORS[0]).mT).solution).mT
    expected = (QUERIES - fitted).norm(dim=1)
    torch.testing.assert_close(Subspace.of(VECTORS).distance(QUERIES, 1), expected)
    torch.testing.assert_close(Subspace.of(VECTORS).distance(QUERIES), expected**2)


def test_rotations_change_nothing_and_translations_nothing_of_affine_hulls():
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=DRAW, dtype=torch.float64)).Q
    shift = torch.randn(40, generator=DRAW, dtype=torch.float64)
    for kind in ("affine", "linear"):
        plain = Subspace.of(VECTORS, kind).distance(QUERIES)
        torch.testing.assert_close(Subspace.of(VECTORS @ rotation, kind).distance(QUERIES @ rotation), plain)
        moved = Subspace.of(VECTORS + shift, kind).distance(QUERIES + shift)
        assert torch.allclose(moved, plain) == (kind == "affine")


def test_one_vector_is_a_point_and_copies_add_nothing():
    one = Subspace.of(VECTORS[:1])
    assert one.basis.shape == (0, 40)
    torch.testing.assert_close(one.distance(QUERIES), (QUERIES - VECTORS[0]).square().sum(1))
    assert Subspace.of(VECTORS[:1].repeat(5, 1)).basis.shape == (0, 40)
    copied = Subspace.of(torch.cat([VECTORS, VECTORS[:2]]))
    torch.testing.assert_close(copied.project(QUERIES), Subspace.of(VECTORS).project(QUERIES))


def test_more_references_are_never_farther_and_the_span_never_than_the_hull():
    fewer = Subspace.of(VECTORS[:4]).distance(QUERIES)
    assert (Subspace.of(VECTORS).distance(QUERIES) <= fewer + 1e-12).all()
    assert (Subspace.of(VECTORS, "linear").distance(QUERIES) <= Subspace.of(VECTORS).distance(QUERIES) + 1e-12).all()


def test_energy_keeps_the_largest_directions():
    scaled = torch.diag(torch.tensor([10.0, 3.0, 1.0, 0.1], dtype=torch.float64)) @ torch.eye(4, 20, dtype=torch.float64)
    both = torch.cat([scaled, -scaled])  # mean 0, squared singular values 200, 18, 2, 0.02
    assert [len(Subspace.of(both, energy=share).basis) for share in (0.5, 0.95, 0.995, 1.0)] == [1, 2, 3, 4]


def test_gradients_are_finite_on_the_hull():
    point = VECTORS[:2].float().requires_grad_()
    Subspace.of(VECTORS).distance(point, 1).sum().backward()
    assert torch.isfinite(point.grad).all()


@pytest.mark.parametrize(
    "vectors, energy, message",
    [(torch.randn(12, 20), 1.0, "11 of 20 dimensions"), (torch.zeros(0, 5), 1.0, r"\(0, 5\)"), (torch.randn(2, 9), 0.0, "energy")],
)
def test_what_is_no_subspace(vectors, energy, message):
    with pytest.raises(ValueError, match=message):
        Subspace.of(vectors, energy=energy)


@pytest.mark.parametrize("kind", ["affine", "linear"])
def test_each_further_reference_only_brings_queries_nearer(kind):
    distances = torch.stack([Subspace.of(VECTORS[:count], kind).distance(QUERIES, 1) for count in range(1, 7)])
    assert (distances[1:] <= distances[:-1] + 1e-12).all()
    twice = Subspace.of(torch.cat([VECTORS, VECTORS[1:3]]), kind)
    torch.testing.assert_close(twice.distance(QUERIES, 1), distances[-1])


def test_the_mean_moves_with_copies_but_the_hull_does_not():
    twice = Subspace.of(torch.cat([VECTORS, VECTORS[:2]]))
    assert not torch.allclose(twice.mean, Subspace.of(VECTORS).mean)
    assert twice.basis.shape == (5, 40)


def test_one_vector_spans_a_line_through_the_origin():
    line = Subspace.of(VECTORS[:1], "linear")
    torch.testing.assert_close(line.project(-3 * VECTORS[0]), -3 * VECTORS[0])
    unit = VECTORS[0] / VECTORS[0].norm()
    torch.testing.assert_close(line.distance(QUERIES), QUERIES.square().sum(1) - (QUERIES @ unit) ** 2)


@pytest.mark.parametrize("power", [1, 2])
def test_gradients_are_those_of_differences(power):
    hull = Subspace.of(VECTORS)
    assert torch.autograd.gradcheck(lambda f: hull.distance(f, power), QUERIES[:3].clone().requires_grad_())


@pytest.mark.parametrize("count", [5, 6])
def test_half_of_the_dimensions_is_the_most(count):
    """Of d = 8: 5 vectors have 4 directions, 6 have 5."""
    drawn = torch.randn(count, 8)
    if count == 5:
        assert Subspace.of(drawn).basis.shape == (4, 8)
    else:
        with pytest.raises(ValueError, match="nearly everything would lie in it"):
            Subspace.of(drawn)


def test_half_precision_and_autocast_lose_nothing():
    """A query far along the hull and near to it: the products' rounding would be larger than the distance."""
    hull = Subspace.of(VECTORS)
    queries = (hull.mean + 30 * hull.basis[0] + 0.01 * QUERIES).float()
    exact = hull.distance(queries.double(), 1).float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(hull.distance(queries, 1), exact, rtol=1e-3, atol=0)
    half = queries.bfloat16()
    torch.testing.assert_close(hull.distance(half, 1), hull.distance(half.double(), 1).float(), rtol=1e-3, atol=0)


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="'afine'"):
        Subspace.of(VECTORS, "afine")
    with pytest.raises(ValueError, match="finite"):
        Subspace.of(torch.full((3, 9), float("nan")))
    with pytest.raises(ValueError, match="1 or 2"):
        Subspace.of(VECTORS).distance(QUERIES, 3)
