"""Results of sets x shots x methods x seeds as the few-shot papers print them: a block for each number of shots, and curves over shots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vision_peft.report.comparison import write_csv

Row = dict[str, Any]  # of a run: set, shots, method, seed, test metrics, maybe retention metrics; or error
AVERAGE = "average"
RETENTION = ("retention/before", "retention/after", "retention/difference", "retention/harmonic")


def write_table(rows: Sequence[Row], folder: Path, report: str, wanted: int) -> str:
    """Write rows.csv, table.md and accuracy.png into `folder`; returns the tables as text.

    Args:
        rows: of the runs that have ended, in the order of the table.
        report: test metric, in [0, 1], shown in percent.
        wanted: number of runs of the whole table.
    """
    write_csv(folder / "rows.csv", rows)
    good, failed = [row for row in rows if "error" not in row], [row for row in rows if "error" in row]
    parts = [*_blocks(good, report, f"{report}, percent")]
    for metric in RETENTION:
        if any(metric in row for row in good):
            parts += _blocks([row for row in good if metric in row], metric, f"{metric}, percent")
    parts += [f"{len(good)} of {wanted} runs have ended well." if len(good) < wanted else f"All {wanted} runs have ended well."]
    parts += [f"Failed: {row['method']} on {row['set']}, {_shots(row['shots'])}, seed {row['seed']}: {row['error']}" for row in failed]
    text = "\n\n".join(parts) + "\n"
    (folder / "table.md").write_text(text)
    if good:
        plot(good, folder / "accuracy.png", report)
    return f"{text}\ntable: {folder / 'table.md'}"


def mean_and_spread(rows: Sequence[Row], metric: str) -> dict[tuple[int, str, str], tuple[float, float, int]]:
    """(shots, method, set) -> mean over seeds, standard deviation (nan for one), number of seeds; the set `average` is the mean over
    sets of each seed that has all of them."""
    values: dict[tuple[int, str, str], dict[int, float]] = {}
    for row in rows:
        values.setdefault((row["shots"], row["method"], row["set"]), {})[row["seed"]] = row[metric]
    sets = list(dict.fromkeys(row["set"] for row in rows))
    for shots, method in dict.fromkeys((row["shots"], row["method"]) for row in rows):
        per_set = [values.get((shots, method, name), {}) for name in sets]
        complete = set.intersection(*(set(each) for each in per_set))
        if complete:
            values[shots, method, AVERAGE] = {seed: statistics.mean(each[seed] for each in per_set) for seed in sorted(complete)}
    return {
        key: (statistics.mean(of.values()), statistics.stdev(of.values()) if len(of) > 1 else float("nan"), len(of))
        for key, of in values.items()
    }


def _blocks(rows: Sequence[Row], metric: str, title: str) -> list[str]:
    """A Markdown table for each number of shots; the best of a column is bold."""
    cells = mean_and_spread(rows, metric)
    sets, methods = ([*dict.fromkeys(row[key] for row in rows)] for key in ("set", "method"))
    parts = []
    for shots in dict.fromkeys(row["shots"] for row in rows):
        columns = [*sets, AVERAGE] if len(sets) > 1 else sets
        best = {name: max((cells[key][0] for key in cells if key[0] == shots and key[2] == name), default=0.0) for name in columns}
        lines = [f"| {' | '.join(['method', *columns])} |", f"| --- |{' ---: |' * len(columns)}"]
        for method in methods:
            found = [_cell(cells.get((shots, method, name)), best[name]) for name in columns]
            lines.append(f"| {' | '.join([method, *found])} |")
        parts.append(f"{title}, {_shots(shots)}\n\n" + "\n".join(lines))
    return parts


def _shots(number: int) -> str:
    return f"{number} shot{'s' if number > 1 else ''}"


def _cell(found: tuple[float, float, int] | None, best: float) -> str:
    if found is None:
        return "-"
    mean, spread, seeds = found
    text = f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if seeds > 1 else "")
    return f"**{text}**" if mean == best else text


def plot(rows: Sequence[Row], path: Path, report: str) -> None:
    """The metric against shots, a panel a set and one for the average, a line a method; bands of one standard deviation over seeds."""
    from matplotlib.figure import Figure

    cells = mean_and_spread(rows, report)
    sets, methods = ([*dict.fromkeys(row[key] for row in rows)] for key in ("set", "method"))
    panels = [AVERAGE, *sets] if len(sets) > 1 else sets
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.2 * across, 3.6 * down + 0.6), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    shown = sorted({row["shots"] for row in rows})
    for panel, name in zip(axes, panels):
        for number, method in enumerate(methods):
            points = [(shots, *cells[shots, method, name]) for shots in shown if (shots, method, name) in cells]
            if not points:
                continue
            x, mean, spread = ([*column] for column in zip(*(point[:3] for point in points)))
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "linewidth": 1.2}
            places = [shown.index(each) for each in x]
            panel.plot(places, [100 * each for each in mean], marker="o", markersize=3, label=method, **style)
            if all(each == each for each in spread):
                low, high = ([100 * (m + sign * s) for m, s in zip(mean, spread)] for sign in (-1, 1))
                panel.fill_between(places, low, high, color=style["color"], alpha=0.1, linewidth=0)
        panel.set_xticks(range(len(shown)), [str(each) for each in shown])
        panel.set(title=name, xlabel="shots a class", ylabel=f"{report}, percent")
        panel.grid(alpha=0.25, linewidth=0.5)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(methods), 6), fontsize=8)
    figure.savefig(path, dpi=110)
