"""How well predicted scores agree with opinions."""

from __future__ import annotations

import math
import warnings

import numpy as np
from scipy.optimize import curve_fit
from scipy.special import expit
from scipy.stats import kendalltau, pearsonr, spearmanr

NAMES = ("srcc", "plcc", "plcc_raw", "krcc", "rmse")


def agreement(predicted: np.ndarray, opinions: np.ndarray) -> dict[str, float]:
    """Of two vectors (N,), N >= 3.

    srcc, krcc: Spearman's and Kendall's rank correlations; plcc_raw: Pearson's of the scores as they are; plcc, rmse: after the
    4-parameter logistic that fits the opinions best (its PLCC is no lower than the raw one: say which is meant). All nan, with a
    warning, where the predictions are all the same.
    """
    if np.ptp(predicted) == 0 or np.ptp(opinions) == 0:
        warnings.warn("all scores are the same: no agreement can be computed", stacklevel=2)
        return dict.fromkeys(NAMES, math.nan)
    fitted = logistic_fit(predicted, opinions)
    return {
        "srcc": float(spearmanr(predicted, opinions).statistic),
        "plcc": float(pearsonr(fitted, opinions).statistic),
        "plcc_raw": float(pearsonr(predicted, opinions).statistic),
        "krcc": float(kendalltau(predicted, opinions).statistic),
        "rmse": float(np.sqrt(np.mean((fitted - opinions) ** 2))),
    }


def logistic_fit(predicted: np.ndarray, opinions: np.ndarray) -> np.ndarray:
    """g(x) = (b1 - b2) / (1 + exp(-(x - b3) / b4)) + b2 at the least-squares b; the best straight line where no such fit is found."""
    start = [opinions.max(), opinions.min(), predicted.mean(), predicted.std() / 4]
    line = np.polyval(np.polyfit(predicted, opinions, 1), predicted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # overflow of exp on the way, and a covariance that is not asked for
            found, _ = curve_fit(_logistic, predicted, opinions, start, maxfev=10_000)
    except RuntimeError:
        warnings.warn("the 4-parameter logistic did not converge: a straight line stands in its place", stacklevel=3)
        return line
    curve = _logistic(predicted, *found)
    better = np.ptp(curve) > 0 and np.mean((curve - opinions) ** 2) <= np.mean((line - opinions) ** 2)
    return curve if better else line  # a line is the logistic of infinite width


def _logistic(x: np.ndarray, high: float, low: float, middle: float, width: float) -> np.ndarray:
    return (high - low) * expit((x - middle) / width) + low
