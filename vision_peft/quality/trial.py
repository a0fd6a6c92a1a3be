"""The protocol: ten random divisions of a set, a regressor for each, medians of the agreement on their test parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vision_peft.errors import UserError
from vision_peft.quality.agreement import NAMES, agreement
from vision_peft.quality.opinions import Opinion, divide
from vision_peft.quality.regressor import Regressor, choose_alpha, fit

SHARES = (0.7, 0.1, 0.2)  # ARNIQA's divisions; Re-IQA does not say which it used


def trials(
    opinions: Sequence[Opinion], features: np.ndarray, seeds: Sequence[int] = range(10), shares: tuple[float, float, float] = SHARES
) -> list[dict[str, float]]:
    """Agreement on the test part, and the strength, a division; the strength is chosen on its val part, the fit is on train and val."""
    scores = np.array([opinion.score for opinion in opinions])
    found = []
    for seed in seeds:
        train, val, test = divide(opinions, shares, seed)
        if min(len(train), len(val), len(test)) < 3:
            parts = " / ".join(str(len(part)) for part in (train, val, test))
            raise UserError(f"{len(opinions)} scores (references are kept together) divide into {parts}: each part needs 3")
        alpha = choose_alpha((features[train], scores[train]), (features[val], scores[val]))
        regressor = fit(features[train + val], scores[train + val], alpha)
        found.append({**agreement(regressor(features[test]), scores[test]), "alpha": alpha, "seed": float(seed)})
    return found


def final(opinions: Sequence[Opinion], features: np.ndarray, alpha: float) -> Regressor:
    """A regressor on the whole set, for scoring other pictures."""
    return fit(features, np.array([opinion.score for opinion in opinions]), alpha)


def medians(rows: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Median and standard deviation over divisions, of each measure; divisions in which it could not be computed are left out."""
    found = {name: np.array([row[name] for row in rows]) for name in NAMES}
    known = {name: values[np.isfinite(values)] for name, values in found.items()}
    return {name: (float(np.median(each)), float(each.std(ddof=1))) if len(each) > 1 else (np.nan, np.nan) for name, each in known.items()}
