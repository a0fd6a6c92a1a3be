"""What the methods on random bases share: the bases themselves, drawn once for all layers from the run's seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vision_peft.engine.adapter import Shared
from vision_peft.errors import UserError
from vision_peft.linalg.random_bases import Distribution, draw, mark, standardised


class Basis(NamedTuple):
    shape: tuple[int, ...]
    std: float = 1.0  # standard deviation of an entry


class RandomBases(Shared):
    """Frozen tensors by name, attributes of the module. Never saved: the seed gives them again, and the fingerprint tells if it did not.

    Args:
        bases: sizes by name; drawn in this order, so the draws depend on the set of sites as far as the sizes do.
        exact: give every tensor exactly its std, instead of in expectation.
    """

    def __init__(
        self, bases: Mapping[str, Basis], distribution: Distribution = "uniform", sparsity: float = 3.0, exact: bool = False
    ) -> None:
        super().__init__()
        self.bases, self.distribution, self.sparsity, self.exact = dict(bases), distribution, sparsity, exact
        for name, basis in self.bases.items():
            self.register_buffer(name, torch.zeros(basis.shape), persistent=False)

    def initialize(self, generator: torch.Generator) -> None:
        for name, basis in self.bases.items():
            drawn = draw(basis.shape, generator, self.distribution, self.sparsity)
            self.get_buffer(name).copy_((standardised(drawn) if self.exact else drawn) * basis.std)

    def fingerprint(self) -> Tensor:
        return torch.cat([mark(self.get_buffer(name)) for name in self.bases])


def require_positive(key: str, value: int) -> int:
    """The number; UserError below 1."""
    if value < 1:
        raise UserError(f"adapter.method.{key}: {value} is not positive")
    return value
