"""docs/results_clip.md: the few-shot protocol and its baselines, and retention, on the offline vision-language model.

    python scripts/table_clip.py TABLE_FOLDER RETENTION_FOLDER HIGH_FOLDER     # of the `vision-peft table` commands that the page names
    python scripts/table_clip.py                                   # from the rows in docs/rows/

rows.csv of each is copied to docs/rows/. A difference to LoRA counts as seen where it is larger than two standard errors of the mean of the
differences within (set, seed).
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vision_peft.report.fewshot_table import write_table

HEAD, PAGE = Path("scripts/results_clip_head.md"), Path("docs/results_clip.md")
FILES = {"table": "clip", "retention": "clip_retention", "high": "clip_retention_high"}
ROWS = {name: Path(f"docs/rows/{file}.csv") for name, file in FILES.items()}
PAPERS = {
    "comp_lora": "about 1 point more few-shot accuracy and 1.3 more retention than LoRA",
    "block_lora": "LoRA's accuracy with fewer trained numbers and at less cost",
    "randlora": "full-rank updates beat LoRA's at as many trained numbers",
    "codyra": "ranks are dropped, and less is forgotten than by LoRA",
    "dora": "more accuracy than LoRA at the same rank",
    "diffora": "as LoRA, with adapters in a chosen share of the layers only",
}


def read(name: str) -> list[dict[str, Any]]:
    """Rows with numbers as numbers; those without a result carry `error`."""
    found = []
    for row in csv.DictReader(ROWS[name].read_text().splitlines()):
        kept = {key: value for key, value in row.items() if value != ""}
        for key in kept.keys() - {"set", "method", "error"}:
            kept[key] = int(kept[key]) if key in ("shots", "seed") else float(kept[key])
        found.append(kept)
    return found


def tables(name: str) -> str:
    """As the command prints them, without what it adds about files."""
    rows = read(name)
    with tempfile.TemporaryDirectory() as folder:
        return write_table(rows, Path(folder), "test/accuracy", len(rows)).rpartition("\ntable: ")[0]


def statements(name: str = "retention") -> str:
    """A line a method: few-shot accuracy, retention and cost against LoRA's in the same (set, seed)."""
    rows = [row for row in read(name) if "error" not in row]
    lora = {(row["set"], row["seed"]): row for row in rows if row["method"] == "lora"}
    lines = []
    for method, claim in PAPERS.items():
        own = [row for row in rows if row["method"] == method and (row["set"], row["seed"]) in lora]
        if len(own) < 2:
            continue

        def difference(value: Callable[[dict[str, Any]], float], own: list[dict[str, Any]] = own) -> str:
            each = [100 * (value(row) - value(lora[row["set"], row["seed"]])) for row in own]
            mean, error = statistics.mean(each), statistics.stdev(each) / len(each) ** 0.5
            return f"{mean:+.1f} ± {error:.1f} ({'seen' if abs(mean) > 2 * error else 'not seen'})"

        accuracy = difference(lambda row: row["test/accuracy"])
        kept = difference(lambda row: row["retention/difference"])
        trained = statistics.mean(row["trainable"] / lora[row["set"], row["seed"]]["trainable"] for row in own)
        seconds = statistics.median(row["seconds"] / lora[row["set"], row["seed"]]["seconds"] for row in own)
        lines.append(
            f"- **{method}**. Paper: {claim}. Here against LoRA, over {len(own)} pairs: accuracy {accuracy}, retention {kept}, "
            f"{trained:.2f} x the trained numbers, {seconds:.2f} x the seconds."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="of the table and of the two retention runs")
    for folder, rows in zip(parser.parse_args().folders, ROWS.values()):
        shutil.copy(folder / "rows.csv", rows)
    text = HEAD.read_text()
    for mark, part in (
        ("{table}", tables("table")),
        ("{retention}", tables("retention")),
        ("{statements}", statements()),
        ("{high}", tables("high")),
        ("{high_statements}", statements("high")),
    ):
        text = text.replace(mark, part.strip())
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
