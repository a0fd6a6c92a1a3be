"""Reading SAM's checkpoint into a network of another size, class count or encoder; what was done with each key is told."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vision_peft.errors import UserError, nearest

FRESH = ("mask_decoder.mask_tokens.", "mask_decoder.output_hypernetworks_mlps.", "mask_decoder.iou_prediction_head.")
PREFIXES = ("module.", "sam.", "model.")


@dataclass
class Report:
    """Keys by what became of them."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  # position tables of another image size
    skipped: list[str] = field(default_factory=list)  # of the file, without a place here
    fresh: list[str] = field(default_factory=list)  # of the network, left at their random start

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("resized", "skipped", "fresh"):
            keys = getattr(self, what)
            if keys:
                parts.append(f"{len(keys)} {what} ({keys[0]}{', ...' if len(keys) > 1 else ''})")
        return ", ".join(parts)


def load_sam(network: nn.Module, path: Path, *, classes: int | None, pooled: bool, own_encoder: bool) -> Report:
    """Fill a SamNetwork from a file in SAM's layout (.pth, .pt read with weights_only, or .safetensors).

    `pos_embed` and relative-position tables are resized where their shapes differ. MedSAM's and DistributedDataParallel's wrappings are
    taken off.

    Args:
        classes: of a semantic head, whose mask tokens start fresh where the file has another number; None: they must fit.
        pooled: average the position table as S-SAM does, instead of interpolating it.
        own_encoder: False where the image encoder is not SAM's, and keeps its weights.

    Raises:
        UserError: unreadable, not SAM's, or of another shape; names the file and the key.
    """
    given = _read(path)
    own, report = network.state_dict(), Report()
    found: dict[str, Tensor] = {}
    for key, here in own.items():
        if key.startswith("image_encoder.") and not own_encoder:
            continue
        if key not in given:
            report.fresh.append(key)
            continue
        value = given[key]
        if value.shape != here.shape:
            resized = _fitted(key, value, here, pooled)
            if resized is None and classes is not None and key.startswith(FRESH):
                report.fresh.append(key)
                continue
            if resized is None:
                raise UserError(f"{path}: {key} has shape {tuple(value.shape)}, expected {tuple(here.shape)}: another SAM model?")
            report.resized.append(key)
            value = resized
        else:
            report.loaded.append(key)
        found[key] = value.to(here.dtype)
    report.skipped = [key for key in given if key not in own or (key.startswith("image_encoder.") and not own_encoder)]
    missing = [key for key in report.fresh if not (classes is not None and key.startswith(FRESH))]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing ({len(missing)} keys are): not a checkpoint of this SAM model")
    network.load_state_dict({**own, **found})
    return report


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]})") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):  # MedSAM's training file
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: does not hold a dictionary of tensors")
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if not any(key.startswith("mask_decoder.") for key in state):
        first = next(iter(state), "")
        raise UserError(f"{path}: holds no mask_decoder (its first key is {first!r}{nearest(first, ['mask_decoder.iou_token.weight'])})")
    return state


def _fitted(key: str, value: Tensor, here: Tensor, pooled: bool) -> Tensor | None:
    """A position table at the size of `here`; None for what is no such table."""
    last = key.rpartition(".")[2]
    if last == "pos_embed" and value.ndim == 4 and value.shape[-1] == here.shape[-1]:
        table, size = value.float().permute(0, 3, 1, 2), tuple(here.shape[1:3])
        resized = F.adaptive_avg_pool2d(table, size) if pooled else F.interpolate(table, size, mode="bilinear", align_corners=False)
        return resized.permute(0, 2, 3, 1)
    if last in ("rel_pos_h", "rel_pos_w") and value.shape[1] == here.shape[1]:
        return F.interpolate(value.float().mT[None], here.shape[0], mode="linear", align_corners=False)[0].mT
    return None
