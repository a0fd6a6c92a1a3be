"""Ridge regression of opinions on features, its strength chosen on a val part, kept without pickle."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import Ridge

from vision_peft.engine.store import staged_folder
from vision_peft.errors import UserError
from vision_peft.quality.agreement import agreement

ALPHAS = tuple(10.0 ** (power / 4) for power in range(-12, 25))  # 1e-3 to 1e6
WEIGHTS, CONFIG, EXPERTS = "regressor.safetensors", "regressor.json", "experts"
FORMAT = 1


@dataclass(frozen=True)
class Regressor:
    """score = slope . feature + offset, in float64, because float32 is visibly worse at small strengths.

    Attributes:
        slope: (D,).
        facts: JSON-ready: the experts that gave the features, the strength, the range of the opinions. An expert that is a folder is
            copied into the regressor's, so that this one alone can score.
    """

    slope: np.ndarray
    offset: float
    facts: dict[str, Any]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Scores (N,) of features (N, D)."""
        return features.astype(np.float64) @ self.slope + self.offset

    def save(self, folder: Path) -> None:
        """Write the folder, whole or not at all."""
        with staged_folder(folder, frozenset({WEIGHTS, CONFIG, EXPERTS}), "a regressor's folder") as staging:
            save_file({"slope": self.slope, "offset": np.array([self.offset])}, staging / WEIGHTS)
            facts = {"format": FORMAT, **self.facts}
            if EXPERTS in facts:
                facts[EXPERTS] = [self._kept(expert, staging, index) for index, expert in enumerate(facts[EXPERTS])]
            (staging / CONFIG).write_text(json.dumps(facts, indent=2) + "\n")

    @staticmethod
    def _kept(expert: dict[str, Any], staging: Path, index: int) -> dict[str, Any]:
        if not Path(expert["name"]).is_dir():
            return expert
        shutil.copytree(expert["name"], staging / EXPERTS / str(index))
        return {**expert, "folder": f"{EXPERTS}/{index}"}

    @classmethod
    def load(cls, folder: Path) -> Regressor:
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: no {name} in it: not a regressor's folder")
        try:
            facts = json.loads((folder / CONFIG).read_text())
            tensors = load_file(folder / WEIGHTS)
            slope, offset = tensors["slope"], float(tensors["offset"][0])
            known = facts.pop("format")
        except (ValueError, KeyError, IndexError, AttributeError, SafetensorError) as error:
            raise UserError(f"{folder}: not a whole regressor ({type(error).__name__}: {error})") from error
        if known != FORMAT:
            raise UserError(f"{folder / CONFIG}: format {known} is not known to this version (it reads {FORMAT})")
        return cls(slope, offset, facts)


def fit(features: np.ndarray, opinions: np.ndarray, alpha: float) -> Regressor:
    """Ridge with an unpenalised offset on features as they are."""
    model = Ridge(alpha=alpha).fit(features.astype(np.float64), opinions)
    return Regressor(model.coef_, float(model.intercept_), {"alpha": alpha})


def choose_alpha(train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray], alphas: tuple[float, ...] = ALPHAS) -> float:
    """The strength with the highest rank correlation on the val part; the larger of equals.

    One decomposition serves all: with centred features F = U S V^T the slope is V diag(s / (s^2 + alpha)) U^T y.
    """
    features, opinions = train[0].astype(np.float64), train[1]
    mean, level = features.mean(0), opinions.mean()
    U, s, Vt = np.linalg.svd(features - mean, full_matrices=False)
    projected, inside = U.T @ (opinions - level), (val[0].astype(np.float64) - mean) @ Vt.T
    scores = [agreement_or_low(inside @ (s / (s**2 + alpha) * projected) + level, val[1]) for alpha in alphas]
    return max(zip(scores, alphas))[1]


def agreement_or_low(predicted: np.ndarray, opinions: np.ndarray) -> float:
    """Rank correlation; -1 where there is none."""
    from scipy.stats import spearmanr

    return -1.0 if np.ptp(predicted) < 1e-12 else float(spearmanr(predicted, opinions).statistic)


def evaluate(regressor: Regressor, features: np.ndarray, opinions: np.ndarray) -> dict[str, float]:
    return agreement(regressor(features), opinions)
