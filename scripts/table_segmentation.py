"""docs/results_segmentation.md: vessels of DRIVE by every adapter of SALT's table, and what nuclei give, from the rows of the runs.

    python scripts/table_segmentation.py DRIVE_FOLDER NUCLEI_FOLDER     # of the `vision-peft compare` commands that the page names
    python scripts/table_segmentation.py                                # from the rows in docs/rows/

A difference to LoRA counts as seen where it is larger than two standard errors of the mean of the differences within a seed.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.salt import SALT
from vision_peft.backbones import Sam
from vision_peft.engine.targets import resolve

HEAD, PAGE = Path("scripts/results_segmentation_head.md"), Path("docs/results_segmentation.md")
ROWS = {"drive": Path("docs/rows/segmentation_drive.csv"), "nuclei": Path("docs/rows/segmentation_nuclei.csv")}
MEMORY = Path("docs/rows/segmentation_memory.csv")  # by /usr/bin/time, see the page
STEPS_AN_EPOCH = {"drive": 20, "nuclei": 24}  # items over the batch size
STEPS = 150
COLUMNS = ("dice_image", "dice_pooled", "auc", "cldice", "hd95_pooled", "hd95_max")


def read(name: str) -> list[dict[str, Any]]:
    rows = []
    for row in csv.DictReader(ROWS[name].read_text().splitlines()):
        if row["phase"] == "report":
            rows.append({key: value if key in ("method", "phase", "error") else float(value) for key, value in row.items() if value != ""})
    return rows


def table(name: str) -> str:
    """A row a method, best Dice first: mean and standard deviation over seeds."""
    rows = [row for row in read(name) if "error" not in row]
    methods = {method: [row for row in rows if row["method"] == method] for method in dict.fromkeys(row["method"] for row in rows)}
    ordered = sorted(methods, key=lambda method: -statistics.mean(row["test/dice_image"] for row in methods[method]))
    memory = {row["method"]: row["mib"] for row in csv.DictReader(MEMORY.open())} if name == "drive" else {}
    names = [*COLUMNS, "seeds", "trained", "s an epoch", *(["MiB"] if memory else [])]
    lines = [f"| method | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for method in ordered:
        own = methods[method]
        cells = [_spread([row[f"test/{column}"] for row in own], 1 if column.startswith("hd95") else 3) for column in COLUMNS]
        seconds = statistics.median(row["seconds"] for row in own) * STEPS_AN_EPOCH[name] / STEPS
        cells += [str(len(own)), f"{own[0]['trainable']:,.0f}", f"{seconds:.0f}", *([memory[method]] if memory else [])]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    failed = [f"failed: {row['method']}, seed {row['seed']:g}: {row['error']}" for row in read(name) if "error" in row]
    return "\n".join([*lines, *failed])


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def against(method: str, other: str) -> str:
    """Difference of Dice in points over the seeds that both have."""
    rows = {(row["method"], row["seed"]): row["test/dice_image"] for row in read("drive") if "error" not in row}
    seeds = sorted(seed for name, seed in rows if name == method and (other, seed) in rows)
    each = [100 * (rows[method, seed] - rows[other, seed]) for seed in seeds]
    if not each:
        return "not measured"
    mean = statistics.mean(each)
    if len(each) == 1:
        return f"{mean:+.1f} points of Dice, one seed"
    error = statistics.stdev(each) / len(each) ** 0.5
    seen = "no difference seen" if abs(mean) <= 2 * error else "seen" if mean > 0 else "the opposite is seen"
    return f"{mean:+.1f} ± {error:.1f} points of Dice over {len(each)} seeds ({seen})"


def statements() -> str:
    pairs = [("salt_q256", "lora_r256"), ("salt_q256", "lora_r4"), ("salt_q4", "lora_r4"), ("salt_q256", "s_sam"), ("salt_q4", "s_sam")]
    pairs += [("lora_r4", "decoder_only"), ("full", "lora_r4"), ("lora_r4", "unet")]
    return "\n".join(f"- {method} against {other}: {against(method, other)}." for method, other in pairs)


def percentages() -> str:
    """Of SAM ViT-B at 512: the adapters alone; and the paper's share, which counts norms, positions, text layer and CLIP, too."""
    backbone = Sam("vit_b", image_size=512, compat="salt")
    sites = backbone.sites()
    linear = ["vision.*.attn.qkv", "vision.*.attn.out", "vision.*.mlp.*", "neck.{0,2}"]
    preset = {"*attn*": 760, "*mlp*": 50, "*neck*": 250}
    whole = sum(parameter.numel() for parameter in backbone.network.parameters())
    text, clip, common = 512 * 256 + 256 + 2 * 256, 151_277_313, 959_744
    names = ("trained in adapters", "of SAM, %", "the paper's share, %", "printed there, %")
    lines = [f"| method | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for name, method, printed in (
        ("SALT q = 4", SALT(ranks=preset, tail_rank=4), "0.46"),
        ("SALT q = 256", SALT(ranks=preset, tail_rank=256), "3.9"),
        ("S-SAM", SALT(ratio=1.0), "0.40"),
        ("LoRA r = 4", LoRA(rank=4), "0.64"),
        ("LoRA r = 256", LoRA(rank=256), "14.08"),
    ):
        own = sum(method.count(site) for site in resolve(linear, sites, method))
        share = 100 * (own + common) / (whole + clip + text + own)
        lines.append(f"| {name} | {own:,} | {100 * own / whole:.2f} | {share:.2f} | {printed} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    for folder, rows in zip(parser.parse_args().folders, ROWS.values()):
        shutil.copy(folder / "trials.csv", rows)
    text = HEAD.read_text()
    parts = {"drive": table("drive"), "nuclei": table("nuclei"), "statements": statements(), "shares": percentages()}
    for mark, part in ((f"{{{name}}}", text_of) for name, text_of in parts.items()):
        text = text.replace(mark, part)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
