"""Some neighbouring classes of a set as a set of their own, so that one set can give several tasks."""

from __future__ import annotations

from dataclasses import replace

from vision_peft.data.records import ImageSplits, Record
from vision_peft.data.source import Source
from vision_peft.errors import UserError


class ClassSubset(Source):
    """The classes start, start + 1, ..., stop - 1 of another source, under the labels 0, 1, ...; order is kept.

    Args:
        source: the whole set.
        start, stop: labels, as a Python range.
    """

    def __init__(self, source: Source, start: int, stop: int) -> None:
        if not 0 <= start < stop:
            raise UserError(f"data.source: start {start} and stop {stop} are no range of classes")
        self.source, self.start, self.stop = source, start, stop

    def read(self) -> ImageSplits:
        whole = self.source.read()
        if self.stop > len(whole.class_names):
            raise UserError(f"data.source.stop: {self.stop}, but {type(self.source).__name__} has {len(whole.class_names)} classes")
        parts = (self._kept(split) for split in (whole.train, whole.val, whole.test))
        return ImageSplits(*parts, class_names=whole.class_names[self.start : self.stop])

    def _kept(self, records: list[Record]) -> list[Record]:
        return [replace(record, label=record.label - self.start) for record in records if self.start <= record.label < self.stop]
