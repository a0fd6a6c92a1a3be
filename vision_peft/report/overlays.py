"""Pictures of segmentations: image, truth, prediction, and where the two differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLOURS = np.array([[0, 0, 0], [0.12, 0.75, 0.45], [0.95, 0.62, 0.1], [0.25, 0.5, 0.95], [0.85, 0.3, 0.75], [0.95, 0.9, 0.2]])
HIT, EXTRA, MISSED = (0.85, 0.85, 0.85), (0.9, 0.1, 0.15), (0.1, 0.45, 0.95)


def save_overlays(rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]], path: Path) -> None:
    """A row each: title, image (H, W, 3) in [0, 1], truth and prediction (H, W) as class indices, valid (H, W).

    In the last column grey is right, red is predicted but not true, blue is true but not predicted.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), 4, figsize=(13, 3.4 * len(rows)), squeeze=False, layout="constrained")
    for place, (title, image, truth, prediction, valid) in zip(axes, rows):
        shown = (image, _painted(image, truth), _painted(image, prediction), _errors(truth, prediction, valid))
        for axis, picture, name in zip(place, shown, (title, "truth", "prediction", "grey right, red extra, blue missed")):
            axis.imshow(picture)
            axis.set_title(name, fontsize=9)
            axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _painted(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    colour = COLOURS[np.where(labels > 0, (labels - 1) % (len(COLOURS) - 1) + 1, 0)]
    return np.where((labels > 0)[..., None], 0.35 * image + 0.65 * colour, image)


def _errors(truth: np.ndarray, prediction: np.ndarray, valid: np.ndarray) -> np.ndarray:
    picture = np.zeros((*truth.shape, 3))
    picture[(truth == prediction) & (truth > 0)] = HIT
    picture[(truth != prediction) & (prediction > 0)] = EXTRA
    picture[(truth != prediction) & (truth > 0)] = MISSED
    picture[~valid] = 0
    return picture
