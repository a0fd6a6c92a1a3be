"""docs/results_quality.md from feature folders (`vision-peft quality extract`) on biq2021 and what the commands printed.

python scripts/table_quality.py --scores biq2021/split.csv --features NAME=FOLDER ... --printed FOLDER

Without --features the page is made anew from docs/rows. FOLDER of --printed holds sensitivity.txt, sensitivity_levels.txt and speed.txt:
see the page.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
import shutil
import statistics
from pathlib import Path

import numpy as np

from vision_peft.quality.agreement import NAMES
from vision_peft.quality.extraction import load_extracted
from vision_peft.quality.opinions import Opinion, read_opinions
from vision_peft.quality.trial import medians, trials

ROOT = Path(__file__).parents[1]
HEAD, PAGE = ROOT / "scripts" / "results_quality_head.md", ROOT / "docs" / "results_quality.md"
ROWS, PRINTED = ROOT / "docs" / "rows" / "quality_biq2021.csv", ROOT / "docs" / "rows"
TEXTS = ("sensitivity", "sensitivity_levels", "speed")
MIXTURES = (("content", "quality"), ("content", "dino"), ("content", "random"), ("content", "resnet18"), ("content", "quality", "dino"))


def scenes(opinions: list[Opinion]) -> list[Opinion]:
    """With blocks of 40 neighbouring numbers as references: biq2021's neighbours often show one scene."""

    def block(path: Path) -> str:
        subset, number = re.match(r"ss(\d+)_(\d+)", path.stem).groups()
        return f"{subset}/{int(number) // 40}"

    return [dataclasses.replace(opinion, reference=block(opinion.path)) for opinion in opinions]


def run_trials(scores: str, folders: dict[str, Path]) -> None:
    opinions = read_opinions(scores, "--scores")
    values = {}
    for name, folder in folders.items():
        extracted = load_extracted(folder)
        places = {path: index for index, path in enumerate(extracted.paths)}
        values[name] = extracted.values[[places[str(opinion.path)] for opinion in opinions]]
    mixtures = [(name,) for name in values] + [each for each in MIXTURES if set(each) <= set(values)]
    with ROWS.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["experts", "divided", "seed", "alpha", *NAMES])
        writer.writeheader()
        for divided, rated in (("pictures", opinions), ("scenes", scenes(opinions))):
            for mixture in mixtures:
                features = np.concatenate([values[name] for name in mixture], 1)
                for row in trials(rated, features):
                    writer.writerow({"experts": " + ".join(mixture), "divided": divided, **row})


def read(divided: str) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {}
    for row in csv.DictReader(ROWS.open()):
        if row["divided"] == divided:
            numbers = {name: float(row[name]) for name in (*NAMES, "seed", "alpha")}
            found.setdefault(row["experts"], []).append(numbers)
    return found


def table(divided: str) -> str:
    lines = [f"| experts | {' | '.join(NAMES)} |", f"| --- |{' ---: |' * len(NAMES)}"]
    found = {experts: medians(rows) for experts, rows in read(divided).items()}
    for experts in sorted(found, key=lambda experts: -found[experts]["srcc"][0]):
        cells = " | ".join(f"{median:.3f} ± {spread:.3f}" for median, spread in found[experts].values())
        lines.append(f"| {experts} | {cells} |")
    return "\n".join(lines)


def against(mixture: str, alone: str, divided: str) -> str:
    """Difference of SRCC over the divisions, which are the same for both."""
    rows = read(divided)
    each = [100 * (a["srcc"] - b["srcc"]) for a, b in zip(rows[mixture], rows[alone])]
    mean, deviation = statistics.mean(each), statistics.stdev(each)
    higher = f"higher in {sum(difference > 0 for difference in each)} of {len(each)}"
    return f"- {mixture} against {alone}, divided by {divided}: {mean:+.1f} ± {deviation:.1f} points of SRCC, {higher}."


def statements() -> str:
    pairs = [("content + quality", "content"), ("content + quality", "quality"), ("quality", "content"), ("content + random", "content")]
    return "\n".join(against(*pair, divided) for divided in ("scenes", "pictures") for pair in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", default="biq2021/split.csv")
    parser.add_argument("--features", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--printed", type=Path)
    given = parser.parse_args()
    if given.features:
        run_trials(given.scores, {name: Path(folder) for name, _, folder in (each.partition("=") for each in given.features)})
    if given.printed:
        for name in TEXTS:
            shutil.copy(given.printed / f"{name}.txt", PRINTED / f"quality_{name}.txt")
    text = HEAD.read_text()
    parts = {"scenes": table("scenes"), "pictures": table("pictures"), "statements": statements()}
    parts |= {name: (PRINTED / f"quality_{name}.txt").read_text().strip() for name in TEXTS}
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
