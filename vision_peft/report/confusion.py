"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def save_confusion(matrix: Tensor, names: Sequence[str], path: Path) -> None:
    """Write a PNG of counts (C, C), rows true and columns predicted, shaded by the share of the row; names up to 40 classes."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    side = min(max(4.0, 0.28 * len(names) + 2), 14)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=f"accuracy {matrix.trace() / matrix.sum().clamp(min=1):.3f}")
    if len(names) <= 40:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    if len(names) <= 15:
        for row, column in matrix.nonzero().tolist():
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(matrix[row, column])), ha="center", va="center", fontsize=7, color=shade)
    figure.savefig(path, dpi=110)
