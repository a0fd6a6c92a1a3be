"""A few pictures of each of several domains that a generator is adapted to at once, and draws of its own pictures to train on."""

from __future__ import annotations

import random
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vision_peft.backbones.base import Preprocess
from vision_peft.data.generator_images import Picture, load_pictures, read_pictures
from vision_peft.data.loader import ResumableLoader
from vision_peft.data.picture_data import PictureData
from vision_peft.data.roots import existing
from vision_peft.data.sampler import Draw
from vision_peft.errors import UserError, nearest


class DrawDataset(Dataset):
    """{source: which of the generator's own pictures, seed: of its noise and time}; depends on seed, epoch and index alone."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: int | Draw) -> dict[str, int]:
        index, epoch = key if isinstance(key, tuple) else (key, -1)
        return {"source": index, "seed": random.Random(f"{self.seed}/{epoch}/{index}").getrandbits(62)}


class TargetDomains(PictureData):
    """References of the domains; no picture of their hybrid is needed.

    Args:
        images: CSV file with path and domain and (not necessarily) split, or a folder that holds a folder a domain; relative paths start at
            VISION_PEFT_DATA.
        domains: name -> weight of the domain, or a list of names, which then weigh the same; 1 to about 50 pictures each.
        split: rows of a CSV that are references; null: all.
        held_out: split of a CSV whose pictures measure what was reached; null: the references.
        hybrid: domain of a CSV with pictures of the hybrid, for measuring only; null: none.
        mirror: mirrored references are references, too.
        fit: other shapes give their middle square (`crop`) or are squashed.
        sources: of the generator's own pictures that training starts from.
        prompts: that these are drawn by, in turn, where the generator takes prompts (numbers of classes for DiT): what they show, without
            a name of the domain; null: the empty one.
        batch_size: of these, a device and step.
        seed: of order, noise and times.
    """

    def __init__(
        self,
        images: str,
        domains: dict[str, float] | list[str],
        split: str | None = "shot",
        held_out: str | None = "ref",
        hybrid: str | None = None,
        mirror: bool = True,
        fit: Literal["crop", "squash"] = "crop",
        sources: int = 128,
        prompts: list[str] | None = None,
        batch_size: int = 4,
        seed: int = 1,
    ) -> None:
        super().__init__()
        weights = domains if isinstance(domains, dict) else dict.fromkeys(domains, 1.0)
        if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise UserError(f"data.domains: give domains with weights of at least 0 and not all 0, not {domains}")
        self.weights = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        for name, value in (("sources", sources), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"data.{name}: must be at least 1, not {value}")
        self.mirror, self.fit, self.sources, self.batch_size, self.seed = mirror, fit, sources, batch_size, seed
        self.pictures = {name: _of_domain(images, "data.domains", name, split) for name in self.weights}
        self.measured = {name: self._measured(images, name, held_out) for name in self.weights}
        self.hybrid = _of_domain(images, "data.hybrid", hybrid, held_out) if hybrid is not None else []
        self.preprocess: Preprocess | None = None
        self.prompts = prompts or [""]

    def shots(self, name: str) -> Tensor:
        """(n, 3, S, S) in [-1, 1]."""
        return self._load(self.pictures[name])

    def references(self, name: str) -> Tensor:
        """The shots, and behind them their mirror pictures where these count: (n or 2 n, 3, S, S)."""
        images = self.shots(name)
        return torch.cat([images, images.flip(3)]) if self.mirror else images

    def held_out(self, name: str | None) -> Tensor:
        """(n, 3, S, S) in [-1, 1] of a domain; of the hybrid for None, none where there are none."""
        return self._load(self.hybrid if name is None else self.measured[name])

    def train_dataloader(self) -> ResumableLoader:
        return self._training_loader(DrawDataset(self.sources, self.seed))

    def val_dataloader(self) -> DataLoader:
        """One item: what is measured is drawn by the task."""
        return DataLoader(DrawDataset(1, self.seed), generator=torch.Generator().manual_seed(self.seed))

    test_dataloader = val_dataloader

    def _measured(self, images: str, name: str, held_out: str | None) -> list[Picture]:
        """Held-out pictures of the domain, or its references where it has none, as of domains that are a style."""
        try:
            return _of_domain(images, "data.held_out", name, held_out)
        except UserError:
            return self.pictures[name]

    def _load(self, pictures: list[Picture]) -> Tensor:
        size = self.preprocess.size
        return load_pictures(pictures, size, self.fit).float() / 127.5 - 1 if pictures else torch.zeros(0, 3, size, size)


def _of_domain(images: str, key: str, name: str, split: str | None) -> list[Picture]:
    place = existing(images, "data.images")
    if not place.is_dir():
        return read_pictures(images, key, name, split)
    if not (place / name).is_dir():
        there = sorted(each.name for each in place.iterdir() if each.is_dir())
        raise UserError(f"{key}: {place} holds no folder {name!r}{nearest(name, there)}")
    return read_pictures(str((place / name).resolve()), key)


def describe_domains(data: TargetDomains) -> dict[str, Any]:
    """JSON-ready: weights and counts."""
    return {name: {"weight": weight, "references": len(data.pictures[name])} for name, weight in data.weights.items()}
