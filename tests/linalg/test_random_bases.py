"""Draws: moments, seeds, sparsity; marks: what they must see, and what they must not."""

from __future__ import annotations

import pytest
import torch

from vision_peft.linalg.random_bases import draw, mark, standardised

DISTRIBUTIONS = ["uniform", "normal", "ternary"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """As strictly as loading compares fingerprints."""
    return torch.allclose(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mean_0_and_variance_1(distribution):
    drawn = draw((300, 400), seeded(), distribution)
    assert drawn.dtype == torch.float32
    assert abs(float(drawn.mean())) < 0.01
    assert abs(float(drawn.var()) - 1) < 0.02


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_seed_decides_and_the_global_generator_is_left_alone(distribution):
    state = torch.get_rng_state()
    one, again, other = (draw((20, 30), seeded(seed), distribution) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_uniform_is_bounded_by_the_root_of_3():
    drawn = draw((300, 400), seeded())
    assert 1.73 < drawn.max() <= 3**0.5 + 1e-6
    assert -1.73 > drawn.min() >= -(3**0.5) - 1e-6


@pytest.mark.parametrize("sparsity", [1.0, 3.0, 20.0])
def test_ternary(sparsity):
    """Three values; the two signs equally often, zeros in 1 - 1/sparsity of the places."""
    drawn = draw((400, 400), seeded(), "ternary", sparsity)
    assert set(drawn.unique().tolist()) <= {0.0, float(torch.tensor(sparsity).sqrt()), -float(torch.tensor(sparsity).sqrt())}
    assert abs(float((drawn == 0).float().mean()) - (1 - 1 / sparsity)) < 0.005
    assert abs(float((drawn > 0).float().mean()) - 0.5 / sparsity) < 0.005


def test_standardised():
    drawn = standardised(5 * draw((50, 40), seeded(), "ternary"))
    assert abs(float(drawn.square().mean()) - 1) < 1e-6
    assert torch.equal(standardised(torch.zeros(3, 2)), torch.zeros(3, 2))
    assert standardised(torch.tensor([[-4.0]])).item() == -1


@pytest.mark.parametrize("shape", [(7,), (40, 30), (2, 3, 4), (1500, 1500)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_mark_is_small_and_tells_draws_apart(shape, distribution):
    own = mark(draw(shape, seeded(), distribution))
    assert own.shape == (7,) and own.dtype == torch.float32
    assert torch.equal(own, mark(draw(shape, seeded(), distribution)))
    assert not same(own, mark(draw(shape, seeded(1), distribution)))


@pytest.mark.parametrize("place", [0, 1, 777, 2_249_999])
def test_the_mark_sees_one_entry_among_millions(place):
    drawn = draw((1500, 1500), seeded(), "normal")
    own = mark(drawn)
    drawn.view(-1)[place] += 0.02
    assert not same(mark(drawn), own)


def test_the_mark_sees_an_exchange_another_sign_another_size_and_another_order():
    drawn = draw((30, 40), seeded())
    own, swapped = mark(drawn), drawn.clone()
    swapped[3, 4], swapped[20, 30] = drawn[20, 30], drawn[3, 4]
    for other in (swapped, -drawn, 1.01 * drawn, drawn.mT, drawn.flip(0)):
        assert not same(mark(other), own)


def test_the_mark_bears_rounding():
    drawn = draw((1500, 1500), seeded())
    off = drawn * (1 + 1e-7) + 1e-7 * draw((1500, 1500), seeded(1), "normal")
    assert not torch.equal(off, drawn)
    assert same(mark(off), mark(drawn))


def test_the_mark_of_nothing_is_finite():
    assert mark(torch.zeros(3, 3)).isfinite().all()
