"""Where things are kept between runs: verified weights, decoded-image marks, hidden states."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str = "") -> Path:
    """A folder in $VISION_PEFT_CACHE, or in ~/.cache/vision_peft; read from the environment at every call, not created."""
    return Path(os.environ.get("VISION_PEFT_CACHE") or "~/.cache/vision_peft").expanduser() / kind
