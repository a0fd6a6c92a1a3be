"""docs/results_continual.md: sequences of tasks on the offline vision-language model.

    python scripts/table_continual.py NAME=FOLDER ...     # run folders of `vision-peft continual`, by the name they get in the page

sequence.json of each is copied to docs/rows/continual/NAME.json; without arguments the page is made from those.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from vision_peft.report.sequence import mean, measures, text_table

HEAD, PAGE, STATES = Path("scripts/results_continual_head.md"), Path("docs/results_continual.md"), Path("docs/rows/continual")


def summary(states: dict[str, dict]) -> str:
    """Transfer / Average / Last / Forgetting of every run, for both kinds of evaluation."""
    names = [f"{kind} {name}" for kind in ("own:", "all:") for name in measures([[0.0]])]
    lines = [f"| run | {' | '.join(names)} | mean rank | drift |", "| --- |" + " ---: |" * 10]
    for name, state in states.items():
        cells = []
        for kind in ("known", "union"):
            found = measures([row[kind] for row in state["rows"]])
            cells += [f"{100 * mean(values):.1f}" for values in found.values()]
        ranks = [rank for row in state["rows"] for rank in row["ranks"].values()]
        cells += [f"{sum(ranks) / len(ranks):.1f}" if ranks else "-", f"{state['rows'][-1]['drift']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    constant = next(iter(states.values()))["zero_shot"]
    cells = []
    for kind in ("known", "union"):
        found = measures([constant[kind]] * len(constant[kind]))
        cells += [f"{100 * mean(values):.1f}" for values in found.values()]
    lines.append(f"| zero-shot | {' | '.join(cells)} | - | 0.00 |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME=FOLDER")
    STATES.mkdir(parents=True, exist_ok=True)
    for run in parser.parse_args().runs:
        name, _, folder = run.partition("=")
        shutil.copy(Path(folder) / "sequence.json", STATES / f"{name}.json")
    states = {path.stem: json.loads(path.read_text()) for path in sorted(STATES.glob("*.json"))}
    parts = []
    for name, state in states.items():
        for kind, title in (("known", "own classes"), ("union", "classes of all tasks")):
            matrix = [row[kind] for row in state["rows"]]
            parts.append(f"### {name}, {title}\n\n{text_table(state['tasks'], state['zero_shot'][kind], matrix, title)}")
    PAGE.write_text(HEAD.read_text().replace("{summary}", summary(states)).replace("{matrices}", "\n\n".join(parts)))


if __name__ == "__main__":
    main()
