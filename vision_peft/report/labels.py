"""Names beside the points of a plot, moved up or down until none covers another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIZE = 7  # of the letters, points
LINE = 1.25 * SIZE  # height that a name takes
LETTER = 0.6 * SIZE  # width of a letter
BESIDE = 5.0  # between a point and its name


def write_beside(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Write every name right of its point, at the nearest free height; a thin line leads from the point to a name that had to move.

    Args:
        axes: matplotlib's, with limits and scales settled.
        points: name -> (x, y) in data units.
    """
    taken: list[tuple[float, float, float]] = []  # left, right, middle of the names that stand, in points on the page
    for name, place in sorted(points.items(), key=lambda item: -item[1][1]):
        left, height = axes.transData.transform(place) * 72 / axes.figure.dpi
        right = left + LETTER * len(name)
        steps = sorted(range(-len(points), len(points) + 1), key=abs)
        shift = next(step * LINE / 2 for step in steps if _free(left, right, height + step * LINE / 2, taken))
        taken.append((left, right, height + shift))
        line = {"arrowprops": {"arrowstyle": "-", "linewidth": 0.3, "color": "0.5", "relpos": (0, 0.5)}} if shift else {}
        offset = (BESIDE + (6.0 if shift else 0.0), shift)
        axes.annotate(name, place, xytext=offset, textcoords="offset points", fontsize=SIZE, va="center", **line)


def _free(left: float, right: float, middle: float, taken: list[tuple[float, float, float]]) -> bool:
    return all(right < other_left or left > other_right or abs(middle - other) >= LINE for other_left, other_right, other in taken)
