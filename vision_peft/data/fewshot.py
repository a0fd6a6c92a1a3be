"""The k-shot draw of CLIP-LoRA (and CoOp before it): the same pictures for the same seed as in the published code."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable

from vision_peft.data.records import ImageSplits, Record
from vision_peft.errors import UserError

MAX_VAL_SHOTS = 4


def few_shot(splits: ImageSplits, shots: int | None, seed: int) -> tuple[list[Record], list[Record]]:
    """(train, val): `shots` training and min(shots, 4) validation pictures a class, class after class.

    One Python stream, seeded with `seed`, makes all draws, validation first. Classes come in the order in which they first appear
    in the list drawn from. A class with too few pictures is drawn with repetition, so that it still has `shots` entries.

    A set without val (ImageNet) gets both from train: one draw of shots + min(shots, 4) pictures a class, the first `shots` of which
    are for training. There too small a class gives what is left after training to val, which may be nothing.

    Args:
        splits: a whole set.
        shots: pictures a class, or None for everything: train and val are returned as they are.
        seed: of the draw; the published runs used 1, 2, 3.

    Raises:
        UserError: shots below 1.
    """
    if shots is None:
        return list(splits.train), list(splits.val)
    if shots < 1:
        raise UserError(f"data.shots: must be at least 1 or null, not {shots}")
    stream = random.Random(seed)
    val_shots = min(shots, MAX_VAL_SHOTS)
    if splits.val:
        # The order of these two lines is part of the protocol: val uses up the stream first.
        val = [record for items in _by_class(splits.val) for record in _draw(items, val_shots, stream)]
        train = [record for items in _by_class(splits.train) for record in _draw(items, shots, stream)]
        return train, val
    train, val = [], []
    for items in _by_class(splits.train):
        drawn = _draw(items, max(shots, min(shots + val_shots, len(items))), stream)
        train += drawn[:shots]
        val += drawn[shots:]
    return train, val


def _by_class(records: Iterable[Record]) -> Iterable[list[Record]]:
    classes: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        classes[record.label].append(record)
    return classes.values()


def _draw(items: list[Record], count: int, stream: random.Random) -> list[Record]:
    return stream.sample(items, count) if len(items) >= count else stream.choices(items, k=count)
