"""Adapt vision and vision-language models with any parameter-efficient method. Names are loaded on first use: importing this is free."""

from __future__ import annotations

from typing import Any

_HOMES = {
    "attach": "engine.install",
    "detach": "engine.install",
    "activate": "engine.install",
    "adapters_off": "engine.install",
    "merge": "engine.install",
    "unmerge": "engine.install",
    "save_adapter": "engine.store",
    "load_adapter": "engine.store",
    "find_method": "engine.adapter",
}
__all__ = [*_HOMES]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vision_peft' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"vision_peft.{_HOMES[name]}"), name)
