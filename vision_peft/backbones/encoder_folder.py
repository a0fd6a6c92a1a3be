"""A whole trained image encoder as a folder: encoder.safetensors under timm's own names, and encoder.json that says what to build."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vision_peft.backbones.vit import Vit
from vision_peft.engine.store import load_strictly, staged_folder
from vision_peft.errors import UserError

WEIGHTS, CONFIG = "encoder.safetensors", "encoder.json"
ARGUMENTS = ("name", "image_size", "depth", "pool")


def save_encoder(folder: Path, backbone: Vit, facts: Mapping[str, Any]) -> None:
    """Write the folder, whole or not at all.

    Args:
        facts: JSON-ready: what a user of the encoder must know, e.g. how its input is normalised.
    """
    with staged_folder(folder, frozenset({WEIGHTS, CONFIG}), "an encoder's folder") as staging:
        state = {key: value.detach().cpu().contiguous().clone() for key, value in backbone.network.state_dict().items()}
        save_file(state, staging / WEIGHTS, {"format": "pt"})
        described = backbone.describe()
        config = {"backbone": {key: described[key] for key in ARGUMENTS}, **facts}
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_encoder(folder: Path, dynamic: bool = False) -> tuple[Vit, dict[str, Any]]:
    """The frozen encoder and its facts.

    Args:
        dynamic: as in Vit, for transformers.

    Raises:
        UserError: a file is missing or broken, or does not fit what it describes.
    """
    try:
        facts = json.loads((folder / CONFIG).read_text())
        described = {key: facts["backbone"][key] for key in ARGUMENTS}
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: not a whole encoder's folder ({type(error).__name__}: {error})") from error
    backbone = Vit(**described, pretrained=False)
    if dynamic and backbone.is_transformer:
        backbone = Vit(**described, pretrained=False, dynamic=True)
    backbone.load()
    load_strictly(backbone.network, tensors, f"{folder}/{WEIGHTS}")
    return backbone, facts
