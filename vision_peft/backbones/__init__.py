"""Pretrained networks. Imported on first use, because timm, open_clip and transformers each take seconds."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {"Vit": "vit", "Clip": "clip", "DualEncoder": "dual_encoder", "Sam": "sam", "UNet": "monai_unet", "Diffusion": "diffusion"}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
