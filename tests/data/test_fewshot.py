"""The draw against the protocol written out by hand with Python's own global functions."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from vision_peft.data.fewshot import few_shot
from vision_peft.data.records import ImageSplits, Record
from vision_peft.errors import UserError


def _records(prefix: str, counts: dict[int, int]) -> list[Record]:
    """Classes interleaved, in the order of `counts`: the first appearance is not the numeric order."""
    rounds = range(max(counts.values()))
    return [Record(Path(f"{prefix}{label}-{number}"), label) for number in rounds for label in counts if number < counts[label]]


SPLITS = ImageSplits(_records("t", {2: 9, 0: 12, 1: 3}), _records("v", {1: 5, 2: 6, 0: 2}), [], ["a", "b", "c"])


@pytest.mark.parametrize("shots", [1, 2, 4, 8])
def test_val_first_then_train_from_one_stream(shots):
    random.seed(7)
    expected_val, expected_train = [], []
    for records, count, expected in ((SPLITS.val, min(shots, 4), expected_val), (SPLITS.train, shots, expected_train)):
        for label in dict.fromkeys(record.label for record in records):
            items = [record for record in records if record.label == label]
            expected += random.sample(items, count) if len(items) >= count else random.choices(items, k=count)
    train, val = few_shot(SPLITS, shots, seed=7)
    assert val == expected_val and train == expected_train
    assert Counter(record.label for record in train) == {0: shots, 1: shots, 2: shots}


def test_small_class_repeats_and_seed_matters():
    train, _ = few_shot(SPLITS, 8, seed=1)
    small = [record for record in train if record.label == 1]
    assert len(small) == 8 and len(set(small)) <= 3
    assert few_shot(SPLITS, 8, seed=1)[0] == train != few_shot(SPLITS, 8, seed=2)[0]


def test_without_val_both_come_from_one_draw_per_class():
    whole = ImageSplits(SPLITS.train, [], [], SPLITS.class_names)
    random.seed(3)
    drawn = [random.sample([record for record in whole.train if record.label == label], 4) for label in (2, 0)]
    train, val = few_shot(whole, 2, seed=3)
    assert train[:4] == drawn[0][:2] + drawn[1][:2] and val[:4] == drawn[0][2:] + drawn[1][2:]
    # Class 1 has 3 pictures: two shots, and the one that is left for val.
    assert len(train) == 6 and len(val) == 5 and not set(train) & set(val)


def test_without_val_too_small_a_class_still_has_its_shots():
    train, val = few_shot(ImageSplits(SPLITS.train, [], [], SPLITS.class_names), 4, seed=3)
    assert Counter(record.label for record in train) == {0: 4, 1: 4, 2: 4}
    assert Counter(record.label for record in val) == {0: 4, 2: 4}


def test_none_is_everything_and_zero_an_error():
    assert few_shot(SPLITS, None, seed=1) == (SPLITS.train, SPLITS.val)
    with pytest.raises(UserError, match=r"data\.shots"):
        few_shot(SPLITS, 0, seed=1)
