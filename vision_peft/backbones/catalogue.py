"""The vision backbones a config may name."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch

import timm

from vision_peft.backbones.offline import CARRIERS
from vision_peft.backbones.recipes import RECIPES


def list_backbones(pattern: str = "*") -> Iterator[tuple[str, str, int | None]]:
    """(name, kind, parameters) of the backbones whose name matches the glob; kind is `offline` or `timm`.

    The number of parameters is that of the stored network, None where it would take building the network to know.
    """
    for name in RECIPES:
        if fnmatch(name, pattern):
            yield name, "offline", CARRIERS[name].parameters
    for name in timm.list_models(pattern):
        yield name, "timm", None
