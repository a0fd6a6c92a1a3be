"""Strict loading of a weights file into a timm network."""

from __future__ import annotations

import sys
from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor, nn

from vision_peft.errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth")


def check_weights_file(path: Path) -> None:
    """UserError where the path cannot be a weights file; nothing is read."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"weights {path}: the file must end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"weights {path}: no such file")


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill a network built with num_classes=0 from a file in timm's layout or in any layout timm converts for this architecture.

    timm's converter also resamples position tables to the network's image size (resample_abs_pos_embed for ViTs). The
    classifier of the file is left out; everything else must match name by name and shape by shape.

    Raises:
        UserError: the file is unreadable, not only tensors (weights_only), or does not match; names the keys.
    """
    check_weights_file(path)
    try:
        given = _converted(load_state_dict(str(path), weights_only=True), network)
    except Exception as error:  # whatever a foreign file provokes in torch, safetensors or timm's converters
        raise UserError(f"weights {path}: cannot be read as {type(network).__name__}: {first_line(error)}") from error
    own = network.state_dict()
    for classifier in _classifiers(network):
        for part in ("weight", "bias"):
            if f"{classifier}.{part}" not in own:
                given.pop(f"{classifier}.{part}", None)
    missing = [key for key in own if key not in given]
    extra = [key for key in given if key not in own]
    wrong = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    found = {"missing": missing, "not in the network:": extra, "shape of": wrong}
    complaints = [f"{what} {_some(keys)}" for what, keys in found.items() if keys]
    if complaints:
        raise UserError(f"weights {path}: do not fit {type(network).__name__}: {'; '.join(complaints)}")
    network.load_state_dict(given)


def _converted(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names and in the shapes of `network`, by the converter that timm keeps beside the architecture."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    return dict(convert(weights, network) if convert else weights)


def _classifiers(network: nn.Module) -> tuple[str, ...]:
    named = network.pretrained_cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _some(keys: list[str], count: int = 4) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


def first_line(error: Exception) -> str:
    """What an error of another library says, cut to the one line a UserError has room for."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
