"""Importance, budgets and their division: numbers worked out by hand, and properties over random ones."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from vision_peft.adapters._importance import Sensitivity, cubic_budget, divide, keep_highest, require_beta
from vision_peft.errors import UserError


def test_two_steps_by_hand():
    """I = 6, then 2: mean 3, then 0.5 * 3 + 0.5 * 2 = 2.5; deviation 0.25 * 3 = 0.75, then 0.75 * 0.75 + 0.25 * 0.5 = 0.6875."""
    p = nn.Parameter(torch.tensor([-2.0]))
    averages = Sensitivity((1,), 0.5, 0.75)
    for gradient in (3.0, 1.0):
        p.grad = torch.tensor([gradient])
        with torch.no_grad():
            averages.update(p)
    assert averages.mean.item() == pytest.approx(2.5)
    assert averages.deviation.item() == pytest.approx(0.6875)
    assert averages.score().item() == pytest.approx(2.5 * 0.6875)


def test_no_gradient_changes_nothing_and_nan_counts_as_zero():
    p, averages = nn.Parameter(torch.ones(2)), Sensitivity((2,), 0.85, 0.85)
    averages.update(p)
    assert not averages.mean.any()
    p.grad = torch.tensor([float("nan"), 1.0])
    with torch.no_grad():
        averages.update(p)
    torch.testing.assert_close(averages.mean, torch.tensor([0.0, 0.15]))


def test_scores_grow_with_the_square_of_the_gradients():
    p, one, ten = nn.Parameter(torch.randn(5)), Sensitivity((5,), 0.85, 0.85), Sensitivity((5,), 0.85, 0.85)
    for _ in range(4):
        g = torch.randn(5)
        with torch.no_grad():
            p.grad = g
            one.update(p)
            p.grad = 10 * g
            ten.update(p)
    torch.testing.assert_close(ten.score(), 100 * one.score())


def test_the_averages_are_saved():
    assert set(Sensitivity((2, 3), 0.85, 0.85).state_dict()) == {"mean", "deviation"}


def test_budget_of_the_worked_example():
    """Three matrices of 174 entries, sparsity 0.1 to 0.8, warm-ups 2 and 3, 12 ticks."""
    found = [cubic_budget(tick, 12, 0.9 * 174, 0.2 * 174, 2, 3) for tick in range(12)]
    assert found == pytest.approx([156.6, 156.6, 156.6, 111, 79, 57, 44, 37, 35, 34, 34.8, 34.8])


def test_budget_falls_from_first_to_last():
    found = [cubic_budget(step, 100, 96, 64, 10, 50) for step in range(101)]
    assert found[:11] == [96] * 11
    assert found[50:] == [64] * 51
    assert all(a >= b for a, b in pairwise(found))
    assert found[30] == 64 + int(32 * 0.5**3)


def test_the_highest_of_all_together():
    kept = keep_highest([torch.tensor([1.0, 5, 2]), torch.tensor([4.0, 0])], 2)
    assert [mask.tolist() for mask in kept] == [[False, True, False], [True, False]]


@pytest.mark.parametrize("budget", [0, 1, 7, 12])
def test_exactly_so_many_are_kept_even_of_equal_scores(budget):
    kept = keep_highest([torch.ones(5), torch.ones(7)], budget)
    assert sum(int(mask.sum()) for mask in kept) == budget
    assert torch.cat(kept)[:budget].all()


@pytest.mark.parametrize(
    "total, scores, caps, expected",
    [
        (10, [1, 1], [20, 20], [5, 5]),  # equal scores: equal volumes, whatever the sizes
        (10, [1, 1], [3, 20], [3, 7]),  # the rest goes to the others
        (12, [6, 3, 1], [4, 5, 9], [4, 5, 3]),  # 7.2 and then 6 are cut
        (10, [0, 0], [9, 9], [5, 5]),  # no scores: equal
        (6, [1, 0], [4, 9], [4, 2]),  # only those without a score have room
        (7, [1, 1, 1], [9, 9, 9], [3, 2, 2]),  # largest remainder; of equal ones the first
        (100, [1, 2], [3, 4], [3, 4]),
        (34.8, [1, 2, 3], [54, 72, 48], [6, 11, 17]),
        (0, [1, 2], [3, 4], [0, 0]),
    ],
)
def test_division(total, scores, caps, expected):
    assert divide(total, torch.tensor(scores), torch.tensor(caps)).tolist() == expected


def test_division_of_random_budgets_is_exact_capped_and_proportional():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        caps = torch.randint(1, 400, (6,), generator=generator)
        scores = torch.rand(6, generator=generator, dtype=torch.float64) ** 4
        total = int(torch.randint(0, 2000, (1,), generator=generator))
        parts = divide(total, scores, caps)
        assert int(parts.sum()) == min(total, int(caps.sum()))
        assert ((parts >= 0) & (parts <= caps)).all()
        free = parts < caps
        if free.sum() > 1:  # those with room share in proportion, to a unit
            level = parts[free].sum() / scores[free].sum()
            assert (parts[free] - level * scores[free]).abs().max() < 2


def test_division_of_more_entries_than_float32_can_count():
    caps = torch.tensor([3 * 2**24 + 1, 2**24 + 1])
    assert int(divide(4 * 2**24 + 1, torch.tensor([3.0, 1.0]), caps).sum()) == 4 * 2**24 + 1


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_betas(beta):
    with pytest.raises(UserError, match=r"^adapter[.]method[.]beta2: "):
        require_beta("beta2", beta)
