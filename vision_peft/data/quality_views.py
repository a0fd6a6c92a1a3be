"""Pairs of crops of one picture under several distortions: equal quality, mostly different content.

Of a picture X:
1. versions: X and n distortions of it, of n different kinds, each at a level of its own from 1 to 5;
2. scales: the versions at full and at half size (bicubic, corners aligned, not antialiased);
3. crops: A and B, P x P each, which overlap by 10 to 30 % of their area, at the same place in all versions of a scale;
4. half-swap: A and B change places in the first (n + 1) // 2 versions at full size, and in the others at half size.

The first crop of a version goes to the query encoder, the second to the key encoder. Beside its own key stand those of the picture's
other versions; where one of the two was swapped, that key shows the query's very content at another quality, so that content does
not give the answer away. (The released code swaps in place on overlapping views, which ruins pixels; here copies are exchanged.)

Source: Saha, Mishra, Bovik, "Re-IQA", CVPR 2023; avinabsaha/ReIQA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_peft.data.distortions.bank import BANK, LEVELS, distort
from vision_peft.errors import UserError, nearest


@dataclass(frozen=True)
class QualityViews:
    """The rule by which a picture becomes pairs.

    Args:
        patch: P, pixels.
        distortions: n, distorted versions beside the picture itself.
        kinds: names of the bank to draw from.
        overlap: smallest and largest share of a crop's area that the other crop covers.
    """

    patch: int = 160
    distortions: int = 11
    kinds: Sequence[str] = field(default_factory=lambda: tuple(BANK))
    overlap: tuple[float, float] = (0.1, 0.3)

    def __post_init__(self) -> None:
        for name in self.kinds:
            if name not in BANK:
                raise UserError(f"data.kinds: unknown distortion {name!r}{nearest(name, BANK)}")
        if not 1 <= self.distortions <= len(set(self.kinds)):
            raise UserError(f"data.distortions: is {self.distortions}, must be from 1 to the {len(set(self.kinds))} kinds there are")
        if not 0 < self.overlap[0] < self.overlap[1] < 1:
            raise UserError(f"data.overlap: {self.overlap} are no two rising shares between 0 and 1")
        if self.patch < 8:
            raise UserError(f"data.patch: must be at least 8 pixels, not {self.patch}")

    @property
    def versions(self) -> int:
        return self.distortions + 1

    @property
    def smallest_side(self) -> int:
        """Of a picture whose half holds every pair of crops."""
        return 2 * (self.patch + self._rows().stop - 1)

    def __call__(self, image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Query and key crops, (2 (n + 1), 3, P, P) each: all versions at full size, then all at half size.

        Args:
            image: (3, H, W) in [0, 1], both sides at least `smallest_side`. The half size may overshoot the range a little.
        """
        full = self.distorted(image, generator)
        half = F.interpolate(full, (full.shape[-2] // 2, full.shape[-1] // 2), mode="bicubic", align_corners=True)
        first = self.versions // 2
        swapped = torch.arange(self.versions) < first
        pairs = [half_swap(*self.crops(full, generator), swapped), half_swap(*self.crops(half, generator), ~swapped)]
        return torch.cat([query for query, _ in pairs]), torch.cat([key for _, key in pairs])

    def distorted(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """(n + 1, 3, H, W): the picture, then its distortions in the order in which their kinds were drawn."""
        kinds = torch.randperm(len(self.kinds), generator=generator)[: self.distortions].tolist()
        levels = torch.randint(1, LEVELS + 1, (self.distortions,), generator=generator).tolist()
        return torch.stack([image, *(distort(image, self.kinds[kind], level, generator) for kind, level in zip(kinds, levels))])

    def crops(self, stack: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A and B (N, 3, P, P) of a stack (N, 3, H, W)."""
        y, x = self.offsets(generator)
        side = self.patch + max(y, x)
        top, left = (_draw(range(length - side + 1), generator) for length in stack.shape[-2:])
        window = stack[..., top : top + side, left : left + side]
        P = self.patch
        return window[..., :P, :P].clone(), window[..., y : y + P, x : x + P].clone()

    def offsets(self, generator: torch.Generator) -> tuple[int, int]:
        """Rows and columns by which B lies off A. (P - y)(P - x) / P^2 is in the range of `overlap`; large y leave little choice of x."""
        P, (low, high) = self.patch, self.overlap
        y = _draw(self._rows(), generator)
        columns = [((1 - share) * P**2 - P * y) / (P - y) for share in (high, low)]
        return y, _draw(_integers(max(columns[0], 0), columns[1]), generator)

    def _rows(self) -> range:
        return _integers(math.floor(self.patch * (1 - self.overlap[1]) + 1e-9), self.patch * (1 - self.overlap[0]))


def half_swap(first: Tensor, second: Tensor, swapped: Tensor) -> tuple[Tensor, Tensor]:
    """The two stacks with the versions that `swapped` (N,) marks exchanged, as copies; twice gives the input again."""
    mask = swapped[:, None, None, None]
    return torch.where(mask, second, first), torch.where(mask, first, second)


def _integers(low: float, high: float) -> range:
    """low <= i < high; the first of them where there is none."""
    start = math.ceil(low - 1e-9)
    return range(start, max(math.ceil(high - 1e-9), start + 1))


def _draw(among: range, generator: torch.Generator) -> int:
    return among[int(torch.randint(len(among), (), generator=generator))]
