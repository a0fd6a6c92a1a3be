"""Pretrained networks. `Vit` and `Clip` are imported on first use, because timm and open_clip each take seconds."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {"Vit": "vit", "Clip": "clip"}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
