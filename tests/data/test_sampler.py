"""The order is a function of (seed, epoch), the same for any number of processes, and can be entered anywhere."""

from __future__ import annotations

import pytest
import torch

from vision_peft.data.sampler import Draw, OrderedSampler, ResumableSampler


def _epoch(sampler: ResumableSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return [draw.index for draw in sampler]


def test_order_depends_on_seed_and_epoch_only():
    a, b = ResumableSampler(range(50), seed=1), ResumableSampler(range(50), seed=1)
    orders = [_epoch(a, epoch) for epoch in range(3)]
    torch.rand(5)
    assert _epoch(b, 2) == orders[2] and _epoch(b, 0) == orders[0]  # straight to epoch 2, then back
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1]
    assert _epoch(ResumableSampler(range(50), seed=2), 0) != orders[1]  # seeds do not walk through each other's epochs


def test_global_state_is_left_alone():
    before = torch.get_rng_state()
    list(ResumableSampler(range(5), seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("length", [32, 33, 3])
def test_two_ranks_together_have_the_batches_of_one_process(length):
    local = 4
    single = _epoch(ResumableSampler(range(length), seed=1), 3)
    ranks = [_epoch(ResumableSampler(range(length), seed=1, rank=rank, world_size=2), 3) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == (length + 1) // 2
    padded = single + single[: length % 2]
    for start in range(0, len(ranks[0]), local):
        together = sorted(ranks[0][start : start + local] + ranks[1][start : start + local])
        assert together == sorted(padded[2 * start : 2 * (start + local)])


def test_more_ranks_than_pictures():
    assert sorted(_epoch(ResumableSampler(range(1), seed=1, rank=2, world_size=3), 0)) == [0]


def test_start_is_for_one_iteration_and_keeps_the_length():
    sampler = ResumableSampler(range(10), seed=1)
    whole = list(sampler)
    sampler.start_at(4)
    assert list(sampler) == whole[4:] and len(sampler) == 10
    assert list(sampler) == whole
    assert whole[0] == Draw(whole[0].index, epoch=0)


def test_evaluation_order_has_every_picture_once():
    parts = [OrderedSampler(range(7), rank, 3) for rank in range(3)]
    assert [list(part) for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [len(part) for part in parts] == [3, 2, 2]
