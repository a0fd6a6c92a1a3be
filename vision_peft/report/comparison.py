"""What a comparison found: a table as text, Markdown and CSV, a plot of accuracy against trained numbers, one HTML file with all of it."""

from __future__ import annotations

import base64
import csv
import statistics
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vision_peft.report.labels import write_beside

Row = dict[str, Any]  # of a trial: phase, method, lr, seed, val, trainable, seconds, mib, test metrics; or error
HEADER = ("method", "trained", "val best", "val median", "val worst", "at rate", "test", "seeds", "s", "MiB")


def write_comparison(rows: Sequence[Row], folder: Path, score: str, report: str) -> str:
    """Write trials.csv, table.csv, table.md, accuracy.png and report.html into `folder`; returns the table as text.

    Args:
        rows: of the trials that have ended; `choose` trials (every rate, one seed) and `report` trials (chosen rate, every seed).
        score: name of the val metric that chose.
        report: test metric of the table, in [0, 1], shown in percent.
    """
    write_csv(folder / "trials.csv", rows)
    summary = summarize(rows, report)
    table = [_cells(each) for each in summary]
    write_csv(folder / "table.csv", summary)
    (folder / "table.md").write_text(_markdown(table))
    plot(summary, folder / "accuracy.png", report)
    failed = [row for row in rows if "error" in row]
    (folder / "report.html").write_text(_html(table, failed, rows, folder / "accuracy.png", score, report))
    widths = [max(map(len, column)) for column in zip(HEADER, *table)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip() for cells in (HEADER, *table)]
    errors = [f"failed: {row['method']} at {row['lr']:g}, seed {row['seed']}: {row['error']}" for row in failed]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *errors, f"report: {folder / 'report.html'}"])


def summarize(rows: Sequence[Row], report: str) -> list[Row]:
    """One dict a method, best test mean first; methods without a finished trial are left out."""
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        good = [row for row in rows if row["method"] == name and "error" not in row]
        tried = [row for row in good if row["phase"] == "choose"] or good  # with one rate there is nothing to choose
        tests = [row[report] for row in good if row["phase"] == "report" and report in row]
        if not tried:
            continue
        values = sorted(row["val"] for row in tried)
        best = max(tried, key=lambda row: (row["val"], -row["lr"]))
        final = [row for row in good if row["phase"] == "report"] or tried
        found.append(
            {
                "method": name,
                "trained": int(best["trainable"]),
                "val_best": values[-1],
                "val_median": statistics.median(values),
                "val_worst": values[0],
                "rates": len(values),
                "lr": best["lr"],
                "test": statistics.mean(tests) if tests else float("nan"),
                "spread": statistics.stdev(tests) if len(tests) > 1 else float("nan"),
                "seeds": len(tests),
                "seconds": statistics.median(row["seconds"] for row in final),
                "mib": statistics.median(row["mib"] for row in final),
            }
        )
    return sorted(found, key=lambda each: -each["test"] if each["test"] == each["test"] else 1.0)


def plot(summary: Sequence[Row], path: Path, report: str) -> None:
    """Accuracy against trained numbers, one point a method, whiskers of one standard deviation over seeds."""
    from matplotlib.figure import Figure

    shown = [each for each in summary if each["seeds"]]
    figure = Figure(figsize=(10, 6.5 if len(shown) < 20 else 11), layout="constrained")
    axes = figure.subplots()
    floor = max(1, min((each["trained"] for each in shown if each["trained"]), default=1) / 4)  # where a method without numbers stands
    points = {}
    for each in shown:
        x, y, spread = max(each["trained"], floor), 100 * each["test"], 100 * each["spread"]
        axes.errorbar(x, y, yerr=spread if spread == spread else None, fmt="o", markersize=4, capsize=2, elinewidth=0.5, alpha=0.6)
        points[each["method"]] = (x, y)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set(xlabel="trained numbers in the adapters", ylabel=f"{report}, percent", title=f"{len(shown)} methods")
    figure.canvas.draw()  # settles where points are on the page
    write_beside(axes, points)
    figure.savefig(path, dpi=120)


def _cells(each: Row) -> tuple[str, ...]:
    test = "-" if not each["seeds"] else f"{100 * each['test']:.1f}" + (f" ± {100 * each['spread']:.1f}" if each["seeds"] > 1 else "")
    values = [f"{100 * each[key]:.1f}" for key in ("val_best", "val_median", "val_worst")]
    return (each["method"], f"{each['trained']:,}", *values, f"{each['lr']:g}", test, str(each["seeds"]),
            f"{each['seconds']:.0f}", f"{each['mib']:.0f}")  # fmt: skip


def _markdown(table: Sequence[Sequence[str]]) -> str:
    rows = [HEADER, ["---"] * len(HEADER), *table]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _html(table: Sequence[Sequence[str]], failed: Sequence[Row], rows: Sequence[Row], picture: Path, score: str, report: str) -> str:
    from jinja2 import Environment

    text = resources.files("vision_peft.report").joinpath("comparison.html").read_text()
    template = Environment(autoescape=True).from_string(text)
    image = base64.b64encode(picture.read_bytes()).decode()
    facts = {"date": time.strftime("%Y-%m-%d"), "score": score, "report": report, "trials": len(rows)}
    return template.render(header=HEADER, table=table, failed=failed, rows=rows, image=image, **facts)
