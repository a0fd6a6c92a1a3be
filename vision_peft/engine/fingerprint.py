"""What identifies a frozen network: a hash of its values, so that an adapter is never put on another one unnoticed."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from vision_peft.engine.install import _find


def fingerprint(network: nn.Module, resized: frozenset[str] = frozenset()) -> str:
    """SHA-256 over names, shapes and bytes of the frozen network's state, without the tables that depend on the image size.

    Adapters that are merged at the moment do not change it.
    """
    found = _find(network, missing_ok=True)
    saved = found.saved if found else {}
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        if key not in resized:
            value = saved.get(key, tensor).detach().cpu().contiguous()
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
