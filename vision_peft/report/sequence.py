"""Measures of a sequence of tasks out of its accuracy matrix, and how they are shown.

R[t][j] is the accuracy on the test split of task j after training task t, both 0 to N - 1; Z[j] that before any training.

    Transfer_j = mean over t < j of R[t][j]      for j >= 1, what is left of zero-shot ability before the task is trained
    Average_j  = mean over all t of R[t][j]
    Last_j     = R[N - 1][j]
    Forgetting_j = max over t of R[t][j] - R[N - 1][j]      for j < N - 1

Each measure is the mean of its columns.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

Matrix = Sequence[Sequence[float]]


def measures(R: Matrix) -> dict[str, list[float | None]]:
    """Transfer, Average, Last and Forgetting by column; None where one is not defined. R has as many rows as columns."""
    N = len(R)
    columns = [[R[t][j] for t in range(N)] for j in range(N)]
    return {
        "Transfer": [statistics.mean(column[:j]) if j else None for j, column in enumerate(columns)],
        "Average": [statistics.mean(column) for column in columns],
        "Last": [column[-1] for column in columns],
        "Forgetting": [max(column) - column[-1] if j < N - 1 else None for j, column in enumerate(columns)],
    }


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are defined; None where none is."""
    defined = [value for value in values if value is not None]
    return statistics.mean(defined) if defined else None


def text_table(names: Sequence[str], zero_shot: Sequence[float], R: Matrix, title: str) -> str:
    """Markdown: the matrix, with the row before training, and the measures once it is complete; percent."""
    rows = [["zero-shot", *zero_shot, mean(zero_shot)]]
    rows += [[f"after {name}", *row, mean(row)] for name, row in zip(names, R)]
    if len(R) == len(names):
        rows += [[measure, *values, mean(values)] for measure, values in measures(R).items()]
    lines = [f"| {' | '.join([title, *names, 'mean'])} |", f"| --- |{' ---: |' * (len(names) + 1)}"]
    lines += [f"| {' | '.join([row[0], *map(_percent, row[1:])])} |" for row in rows]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def write_csv(path: Path, names: Sequence[str], zero_shot: Mapping[str, Sequence[float]], rows: Mapping[str, Matrix]) -> None:
    """One line for each (measure, task trained, task tested)."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["classes", "after", "tested", "accuracy"])
        for kind, matrix in rows.items():
            for after, row in zip(["", *names], [zero_shot[kind], *matrix]):
                writer.writerows([kind, after, tested, f"{value:.6f}"] for tested, value in zip(names, row))


def plot_matrix(path: Path, names: Sequence[str], zero_shot: Mapping[str, Sequence[float]], rows: Mapping[str, Matrix]) -> None:
    """A heat map for each kind of evaluation; the diagonal, where a task has just been trained, is framed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    width = 1.2 + 0.75 * len(names)
    figure = Figure(figsize=(width * len(rows) + 0.8, 0.6 * len(names) + 2.2), layout="constrained")
    for axes, (kind, matrix) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items()):
        values = [[100 * value for value in row] for row in (zero_shot[kind], *matrix)]
        shown = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for t, row in enumerate(values):
            for j, value in enumerate(row):
                axes.text(j, t, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value < 60 else "black")
        for j in range(len(matrix)):
            axes.add_patch(Rectangle((j - 0.5, j + 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1))
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(values)), ["zero-shot", *[f"after {name}" for name in names[: len(matrix)]]], fontsize=7)
        axes.set_title(f"{kind} classes", fontsize=9)
    figure.colorbar(shown, ax=figure.axes, label="accuracy, percent", shrink=0.8)
    figure.savefig(path, dpi=120)


def plot_ranks(path: Path, names: Sequence[str], ranks: Sequence[Mapping[str, int]]) -> None:
    """Ranks of the updates: a panel a task, a row a kind of matrix, a column a block, each tower by itself.

    Args:
        ranks: a task each, {site name: rank}; a name is TOWER.BLOCK.MATRIX where it belongs to a block, and else stands alone.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(_row(site) for each in ranks for site in each))
    blocks = 1 + max((_block(site) for each in ranks for site in each), default=0)
    largest = max((rank for each in ranks for rank in each.values()), default=1)
    figure = Figure(figsize=(1.8 + 0.3 * blocks * len(ranks), 1.6 + 0.24 * len(kinds)), layout="constrained")
    for number, (axes, name, each) in enumerate(zip(figure.subplots(1, len(ranks), squeeze=False)[0], names, ranks)):
        grid = [[float("nan")] * blocks for _ in kinds]
        for site, rank in each.items():
            grid[kinds.index(_row(site))][_block(site)] = rank
        shown = axes.imshow(grid, vmin=0, vmax=max(largest, 1), cmap="magma", aspect="auto")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if value == value:
                    color = "white" if value < 0.6 * largest else "black"
                    axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6, color=color)
        axes.set_yticks(range(len(kinds)), kinds if number == 0 else [""] * len(kinds), fontsize=7)
        axes.set_xticks(range(blocks), [str(block) for block in range(blocks)], fontsize=6)
        axes.set(xlabel="block", title=name)
        axes.title.set_fontsize(8)
    figure.colorbar(shown, ax=figure.axes, label="rank", shrink=0.8)
    figure.savefig(path, dpi=120)


def _block(site: str) -> int:
    parts = site.split(".")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0


def _row(site: str) -> str:
    parts = site.split(".")
    return ".".join([parts[0], *parts[2:]]) if len(parts) > 1 and parts[1].isdigit() else site
