"""docs/results_methods.md: what `vision-peft compare` measured, a sentence a method beside its paper's claim.

    python scripts/table_methods.py DTD10_FOLDER CALTECH_FOLDER LOW_RATES_FOLDER

The folders are those of three comparisons (their commands are in the page); trials.csv and table.csv of each are copied to docs/rows/.
The sentences come from scripts/results_methods_claims.yaml and from the rows: a difference to LoRA counts as seen where it is larger
than two standard errors of the difference of the two means.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path

import yaml

PAGE = Path("docs/results_methods.md")
CLAIMS = yaml.safe_load(Path("scripts/results_methods_claims.yaml").read_text())
HEAD = Path("scripts/results_methods_head.md")


def rows_of(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(f"docs/rows/results_methods_{name}.csv").read_text().splitlines()))


def table_of(name: str) -> dict[str, dict[str, str]]:
    return {row["method"]: row for row in rows_of(name)}


def tests_of(name: str) -> dict[str, list[float]]:
    """Test accuracies in percent of the runs with every seed."""
    found: dict[str, list[float]] = {}
    for row in rows_of(f"{name}_trials"):
        if row["phase"] == "report" and row["test/accuracy"]:
            found.setdefault(row["method"], []).append(100 * float(row["test/accuracy"]))
    return found


def verdict(own: list[float], lora: list[float]) -> str:
    difference = statistics.mean(own) - statistics.mean(lora)
    error = (statistics.variance(own) / len(own) + statistics.variance(lora) / len(lora)) ** 0.5
    seen = "no difference to LoRA can be seen"
    if abs(difference) > 2 * error:
        seen = "better than LoRA" if difference > 0 else "worse than LoRA"
    return f"{spread(own)}, {difference:+.1f} ± {error:.1f} on LoRA: {seen}"


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def percent(value: str) -> str:
    return f"{100 * float(value):.1f}"


def grid(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)] + [""]


def accuracies(name: str) -> list[str]:
    header = ["method", "trained", "val best", "median", "worst", "at rate", "test", "s", "MiB"]
    rows = []
    for method, row in table_of(name).items():
        val = [percent(row[key]) for key in ("val_best", "val_median", "val_worst")]
        test = f"{percent(row['test'])} ± {percent(row['spread'])}"
        cost = [f"{float(row[key]):.0f}" for key in ("seconds", "mib")]
        rows.append([method, f"{int(row['trained']):,}", *val, f"{float(row['lr']):g}", test, *cost])
    return grid(header, rows)


def below_the_probe() -> list[str]:
    """The same methods at a tenth of their configuration's rate: does the loss come from the rate that 40 val pictures chose?"""
    at_rate, lower = tests_of("dtd10"), tests_of("dtd10_low")
    probe = statistics.mean(at_rate["probe"])
    rows = []
    for method, own in lower.items():
        said = "as the probe or above" if statistics.mean(own) >= probe - 0.3 else "still below it"
        rates = [f"{float(table_of(name)[method]['lr']):g}" for name in ("dtd10", "dtd10_low")]
        rows.append([method, rates[0], spread(at_rate[method]), rates[1], spread(own), said])
    header = ["method", "chosen rate", "test there", "a tenth of its file's rate", "test there", f"against the probe's {probe:.1f}"]
    return grid(header, rows)


def sentences() -> list[str]:
    runs = tests_of("dtd10")
    text = []
    for method in sorted(runs):
        here = spread(runs[method]) if method == "lora" else verdict(runs[method], runs["lora"])
        text.append(f"- **{method}**: {CLAIMS[method]}. Here {here}.")
    return [*text, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="of the comparisons on dtd10, on caltech101, and at low rates on dtd10")
    for folder, name in zip(parser.parse_args().folders, ("dtd10", "caltech101", "dtd10_low")):
        shutil.copy(folder / "table.csv", f"docs/rows/results_methods_{name}.csv")
        shutil.copy(folder / "trials.csv", f"docs/rows/results_methods_{name}_trials.csv")
    parts = {"{dtd10}": accuracies("dtd10"), "{caltech101}": accuracies("caltech101"), "{low}": below_the_probe()}
    parts["{sentences}"] = sentences()
    text = HEAD.read_text()
    for mark, lines in parts.items():
        text = text.replace(mark, "\n".join(lines))
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
