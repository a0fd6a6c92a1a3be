"""What a parameter looks like through the active adapters of its sites, and the switches that all readers of a network share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_peft.engine.adapter import Adapter
from vision_peft.engine.factored import Blocks
from vision_peft.engine.site import Site


class State:
    """The switches that all readers of one network share.

    Attributes:
        mix: coefficient of each active adapter set, by name.
        enabled: False inside adapters_off().
        merged: True while the effective values are written into the parameters.
        observer: called with (site, input rows) during an evidence pass; None otherwise.
    """

    def __init__(self) -> None:
        self.mix: dict[str, float] = {}
        self.enabled = True
        self.merged = False
        self.observer: Callable[[Site, Tensor], None] | None = None

    @property
    def live(self) -> bool:
        return self.enabled and not self.merged and bool(self.mix)


class View:
    """The effective value of one parameter: the frozen tensor seen through the active adapters of its sites."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.entries: dict[str, dict[str, tuple[Site, Adapter]]] = {}  # site name -> adapter set -> (site, adapter)

    def add(self, set_name: str, site: Site, adapter: Adapter) -> None:
        self.entries.setdefault(site.name, {})[set_name] = (site, adapter)

    def discard(self, set_name: str) -> None:
        self.entries = {
            name: rest for name, sets in self.entries.items() if (rest := {key: pair for key, pair in sets.items() if key != set_name})
        }

    def sync(self, training: bool) -> None:
        """Put the adapters into the mode of the layer they act on."""
        for sets in self.entries.values():
            for _, adapter in sets.values():
                if adapter.training != training:
                    adapter.train(training)

    def active(self) -> list[tuple[Site, list[tuple[float, Adapter]]]]:
        """Sites in row order, each with the (coefficient, adapter) pairs that are switched on."""
        found = []
        for sets in self.entries.values():
            pairs = [(self.state.mix[name], adapter) for name, (_, adapter) in sets.items() if name in self.state.mix]
            if pairs:
                found.append((next(iter(sets.values()))[0], pairs))
        return sorted(found, key=lambda item: item[0].rows or (0, 0))

    def effective(self, parameter: Tensor) -> Tensor:
        """The tensor used in place of `parameter`, in its shape and type; computed in float32, rounded once."""
        pieces, row, height = [], 0, _height(parameter)
        with torch.autocast(parameter.device.type, enabled=False):
            for site, pairs in self.active():
                start, stop = site.rows or (0, height)
                if start > row:
                    pieces.append(parameter[row:start])
                value = _mixed(site.matrix(parameter).to(torch.promote_types(parameter.dtype, torch.float32)), pairs)
                pieces.append(value.reshape(site.shape).to(parameter.dtype))
                row = stop
            if not pieces:
                return parameter
            if row < height:
                pieces.append(parameter[row:])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def factored(self, parameter: Tensor) -> Blocks | None:
        """Row blocks of the parameter in factored form, or None where an adapter has no such form or several sets are mixed."""
        blocks = []
        with torch.autocast(parameter.device.type, enabled=False):
            for site, pairs in self.active():
                if len(pairs) != 1 or pairs[0][0] != 1.0:
                    return None
                form = pairs[0][1].factored(site.matrix(parameter).float())
                if form is None:
                    return None
                blocks.append((site.rows or (0, parameter.shape[0]), form))
        return blocks or None

    def linear(self, x: Tensor, parameter: Tensor, b: Tensor | None) -> Tensor | None:
        """The layer's output where an adapter computes it itself; None where all act through weights."""
        active = self.active()
        if not any(len(pairs) == 1 and type(pairs[0][1]).linear is not Adapter.linear for _, pairs in active):
            return None
        pieces, row = [], 0
        for site, pairs in active:
            start, stop = site.rows or (0, parameter.shape[0])
            bias = None if b is None else b[start:stop]
            if start > row:
                pieces.append(F.linear(x, parameter[row:start], None if b is None else b[row:start]))
            alone = len(pairs) == 1 and pairs[0][0] == 1.0
            y = pairs[0][1].linear(x, parameter[start:stop], bias) if alone else None
            if y is None:
                W = site.matrix(parameter).float()
                y = F.linear(x, _mixed(W, pairs).to(parameter.dtype), bias)
            pieces.append(y)
            row = stop
        if row < parameter.shape[0]:
            pieces.append(F.linear(x, parameter[row:], None if b is None else b[row:]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _height(parameter: Tensor) -> int:
    """Rows of a parameter's matrix view; a scalar has one."""
    return parameter.shape[0] if parameter.ndim else 1


def _mixed(W: Tensor, pairs: list[tuple[float, Adapter]]) -> Tensor:
    """W + sum of coefficient * (adapted - W); exactly the adapter's own weight when it stands alone at 1."""
    if len(pairs) == 1 and pairs[0][0] == 1.0:
        return pairs[0][1].weight(W)
    return W + sum(coefficient * (adapter.weight(W) - W) for coefficient, adapter in pairs)
