"""Where things are kept between runs: verified weights, decoded-image marks, hidden states."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cache_folder(kind: str = "") -> Path:
    """A folder in $VISION_PEFT_CACHE, or in ~/.cache/vision_peft; read from the environment at every call, not created."""
    return Path(os.environ.get("VISION_PEFT_CACHE") or "~/.cache/vision_peft").expanduser() / kind


def kept_tensors(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Those of a safetensors file, which is computed and written first where it is not there."""
    from safetensors.torch import load_file

    if not path.is_file():
        keep_tensors(path, compute())
    return load_file(path)


def keep_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file at once and whole: other processes see none or all of it, and a failure leaves none."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, staging)
        os.replace(staging, path)
    finally:
        Path(staging).unlink(missing_ok=True)
