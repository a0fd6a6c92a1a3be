"""Records as torch datasets: decode or recall, transform, hand out with the label or the path."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset

from vision_peft.data.images import load_rgb
from vision_peft.data.parallel import map_threads
from vision_peft.data.records import Record
from vision_peft.data.sampler import Draw
from vision_peft.data.transforms import Transform
from vision_peft.errors import UserError

CACHE_LIMIT = 4 * 2**30  # bytes; beyond it a cache is refused, not silently left out
PROBES = 32  # pictures decoded to foresee a cache's size


class ImageDataset(Dataset):
    """Items (image float32 (3, S, S), label), and the item's index as a third with `with_index`.

    Item keys are an int or a Draw. An item's pixels depend on (seed, epoch, index) and nothing else; an int means epoch 0. A picture
    that was drawn twice into a few-shot set has two indices and is augmented differently at each.

    Args:
        records: what to hand out, in this order.
        transform: how.
        seed: of the augmentation.
        cache: decode everything now and keep it (uint8, in front of the random half of the transform). In the constructor and not
            on first use, so that workers share one copy. Changes no pixel.
        with_index: whether items carry their index.
        views: augmented versions of a picture, one an epoch in turn; None for a new one every epoch.

    Raises:
        UserError: a cache of more than 4 GiB; a picture that cannot be decoded.
    """

    def __init__(
        self,
        records: Sequence[Record],
        transform: Transform,
        *,
        seed: int = 0,
        cache: bool = False,
        with_index: bool = False,
        views: int | None = None,
    ) -> None:
        self.records = list(records)
        self.transform = transform
        self.seed = seed
        self.with_index = with_index
        self._views = views
        self.cached = self._decode_all() if cache else None

    @property
    def views(self) -> int | None:
        """How many different versions of a picture there are over all epochs; None: a new one every epoch."""
        return self._views if self.transform.random else 1

    def at(self, index: int, epoch: int) -> Tensor:
        """The image of an index in an epoch, float32 (3, S, S)."""
        return self[Draw(index, epoch)][0]

    def with_image(self, key: int | Draw, image: Tensor) -> tuple[Tensor, int]:
        """The item, with something else in the place of its image."""
        return image, self.records[key.index if isinstance(key, Draw) else key].label

    def identity(self) -> str:
        """Changes with anything the pictures depend on: files and their times, transform, seed, views."""
        paths = [record.path for record in self.records]
        files = [(str(path), path.stat().st_mtime_ns) if path.is_file() else str(path) for path in paths]
        return repr((files, type(self.transform).__name__, sorted(map(repr, vars(self.transform).items())), self.seed, self._views))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, int] | tuple[Tensor, int, int]:
        index, epoch = key if isinstance(key, Draw) else (key, 0)
        epoch = epoch if self._views is None else epoch % self._views
        record = self.records[index]
        pixels = self._decode(record) if self.cached is None else self.cached[index]
        # A string seed is hashed: neighbouring (seed, epoch, index) give unrelated streams.
        image = self.transform.finish(pixels, random.Random(f"{self.seed}/{epoch}/{index}"))
        return (image, record.label, index) if self.with_index else (image, record.label)

    def _decode(self, record: Record) -> Tensor:
        return self.transform.prepare(load_rgb(record))

    def _decode_all(self) -> list[Tensor]:
        probes = [self._decode(record).numel() for record in self.records[:: max(1, len(self.records) // PROBES)]]
        expected = sum(probes) / max(1, len(probes)) * len(self.records)
        if expected > CACHE_LIMIT:
            need = f"about {expected / 2**30:.0f} GiB for {len(self.records)} pictures"
            raise UserError(f"data.cache_images: would take {need}; set it to false (and data.num_workers above 0)")
        return map_threads(self._decode, self.records, "decoding pictures")


class PathDataset(Dataset):
    """Items (image float32 (3, S, S), path str) of pictures without labels."""

    def __init__(self, records: Sequence[Record], transform: Transform) -> None:
        self.records = list(records)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        record = self.records[index]
        image = self.transform.finish(self.transform.prepare(load_rgb(record)), random.Random(0))
        return image, str(record.path)
