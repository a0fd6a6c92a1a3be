"""A regressor's folder as one function from pictures to scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vision_peft.errors import UserError
from vision_peft.quality.experts import features, open_expert
from vision_peft.quality.regressor import Regressor


class Scorer:
    """Scores in the unit of the opinions that the regressor was fitted to; higher is better.

    Args:
        tile: see Encoder, for pictures larger than those that the regressor was fitted to; None: as it was fitted.

    Raises:
        UserError: the folder is broken, or an expert is not the one whose features the regressor knows.
    """

    def __init__(self, folder: Path, tile: int | None = None) -> None:
        self.regressor = Regressor.load(folder)
        wanted = self.regressor.facts["experts"]
        names = [str(folder / each["folder"]) if "folder" in each else each["name"] for each in wanted]
        self.experts = [open_expert(name, tile or each.get("tile"), each.get("bf16", False)) for name, each in zip(names, wanted)]
        for expert, each in zip(self.experts, wanted):
            if expert.describe()["fingerprint"] != each["fingerprint"]:
                raise UserError(f"{folder}: was fitted to other weights of {expert.name} (fingerprints differ)")

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """(B,) of RGB pictures of one size. UserError for one that is too small."""
        return self.regressor(features(self.experts, pictures))
