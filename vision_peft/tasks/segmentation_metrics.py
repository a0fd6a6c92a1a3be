"""Scores of one mask against the truth, each with its definition in its name, and their means over a split.

Empty masks, strictly: both empty is a perfect match (overlaps 1, distances 0); one empty has no overlap, and no distance: such cases are
left out of a distance's mean and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt

NAMES = ("dice_image", "iou_image", "sensitivity", "specificity", "cldice", "hd95_max", "hd95_pooled")


def score(prediction: np.ndarray, target: np.ndarray, valid: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)) -> dict[str, float]:
    """NAMES of two boolean masks (H, W) inside `valid`, and the counts `true_positive`, `predicted`, `positive` in pixels.

    dice_image, iou_image: of this picture; sensitivity, specificity: nan without positives, negatives; cldice: clDice of skeletons;
    hd95_max: larger of the two directions' 95th percentiles of surface distances; hd95_pooled: 95th percentile of both directions'
    distances together. Distances in units of `spacing` (rows, columns).
    """
    prediction, target = prediction & valid, target & valid
    both, predicted, positive, inside = ((prediction & target).sum(), prediction.sum(), target.sum(), valid.sum())
    union, negative = predicted + positive - both, inside - positive
    found = {
        "dice_image": 2 * both / (predicted + positive) if predicted + positive else 1.0,
        "iou_image": both / union if union else 1.0,
        "sensitivity": both / positive if positive else math.nan,
        "specificity": (negative - predicted + both) / negative if negative else math.nan,
        "cldice": cldice(prediction, target),
        **hd95(prediction, target, spacing),
        "true_positive": both,
        "predicted": predicted,
        "positive": positive,
    }
    return {key: float(value) for key, value in found.items()}


def hd95(a: np.ndarray, b: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)) -> dict[str, float]:
    """hd95_max and hd95_pooled of two boolean masks; 0 where both are empty, nan where one is."""
    if not a.any() or not b.any():
        value = 0.0 if a.any() == b.any() else math.nan
        return {"hd95_max": value, "hd95_pooled": value}
    rows, columns = np.nonzero(a | b)  # distances outside the common box are never looked at
    box = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    edges = [mask & ~binary_erosion(mask) for mask in (np.pad(a[box], 1), np.pad(b[box], 1))]
    there = distance_transform_edt(~edges[1], spacing)[edges[0]]
    back = distance_transform_edt(~edges[0], spacing)[edges[1]]
    pooled = np.percentile(np.concatenate([there, back]), 95)
    return {"hd95_max": max(np.percentile(there, 95), np.percentile(back, 95)), "hd95_pooled": pooled}


def cldice(prediction: np.ndarray, target: np.ndarray) -> float:
    """Harmonic mean of the share of each mask's skeleton that lies inside the other mask; 1 where both are empty."""
    if not prediction.any() or not target.any():
        return float(prediction.any() == target.any())
    precision = target[skeleton(prediction)].mean()
    sensitivity = prediction[skeleton(target)].mean()
    return 2 * precision * sensitivity / (precision + sensitivity) if precision + sensitivity else 0.0


def skeleton(mask: np.ndarray) -> np.ndarray:
    """The soft skeleton of the clDice paper, run on a boolean mask until nothing is left to erode."""
    from monai.losses.cldice import soft_skel

    padded = np.pad(mask, 1)  # at the picture's edge erosion would find nothing to take away
    widest = int(distance_transform_edt(padded).max()) + 1
    return soft_skel(torch.from_numpy(padded)[None, None].float(), widest)[0, 0].numpy()[1:-1, 1:-1] > 0.5


def mean_scores(cases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means of NAMES over cases, dice_pooled over all their pixels together, and how many cases were empty or without a distance."""
    means = {name: _mean([case[name] for case in cases]) for name in NAMES}
    total = {key: sum(case[key] for case in cases) for key in ("true_positive", "predicted", "positive")}
    size = total["predicted"] + total["positive"]
    return {
        **means,
        "dice_pooled": 2 * total["true_positive"] / size if size else 1.0,
        "empty_predictions": float(sum(case["predicted"] == 0 and case["positive"] > 0 for case in cases)),
        "empty_targets": float(sum(case["positive"] == 0 for case in cases)),
        "without_distance": float(sum(math.isnan(case["hd95_max"]) for case in cases)),
    }


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
