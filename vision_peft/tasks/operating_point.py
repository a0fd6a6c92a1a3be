"""The threshold above which a probability counts as the target, chosen on the validation split."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

BINS = 200


class OperatingPoint(nn.Module):
    """A part without trained parameters: the threshold travels with checkpoints and adapters.

    Validation feeds each picture's probabilities; choose() takes the threshold with the highest mean Dice over the pictures, exactly, among
    1 / BINS, 2 / BINS, ...
    """

    threshold: Tensor  # () in (0, 1)

    def __init__(self, threshold: float | None) -> None:
        super().__init__()
        self.fixed = threshold is not None
        self.register_buffer("threshold", torch.tensor(0.5 if threshold is None else threshold))
        self.histograms: list[tuple[np.ndarray, np.ndarray]] = []

    def feed(self, probability: np.ndarray, target: np.ndarray, valid: np.ndarray) -> None:
        """Of one picture: (H, W) in [0, 1] and two boolean masks."""
        bins = np.minimum((probability[valid] * BINS).astype(np.int64), BINS - 1)
        hits = target[valid]
        self.histograms.append((np.bincount(bins[hits], minlength=BINS), np.bincount(bins[~hits], minlength=BINS)))

    def choose(self) -> float:
        """Set the threshold unless it was given; returns the mean Dice there. Forgets what was fed."""
        dice = np.mean([_dice(positive, negative) for positive, negative in self.histograms], axis=0)  # (BINS,)
        self.histograms.clear()
        if not self.fixed:
            best = np.flatnonzero(dice[1:] >= dice[1:].max() - 1e-9) + 1
            self.threshold.fill_(best[len(best) // 2] / BINS)  # the middle of equals
        return float(dice[round(float(self.threshold) * BINS)])


def _dice(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Dice for each threshold k / BINS, probabilities at or above it being the target."""
    both = positive[::-1].cumsum()[::-1]
    predicted = both + negative[::-1].cumsum()[::-1]
    size = predicted + positive.sum()
    return np.where(size > 0, 2 * both / np.maximum(size, 1), 1.0)
