"""Every method for a few steps on the other kinds of backbone, through `vision-peft fit`: docs/methods_on_backbones.md.

    OMP_NUM_THREADS=1 VISION_PEFT_DATA=... python scripts/each_backbone.py   # all; appends to docs/rows/methods_on_backbones.csv
    OMP_NUM_THREADS=1 VISION_PEFT_DATA=... python scripts/each_backbone.py --only lora dora --backbones conv
    python scripts/each_backbone.py --write                                                # the page from the rows

CLIP is open_clip's ViT-B-32 in its full size with random weights, adapted in both towers; the convolutional network is EfficientNet-Lite0
with its ImageNet weights, adapted in every convolution, grouped ones included; the generator is what scripts/train_offline_ddpm.py trains
(--generator), adapted in attention and the convolutions of its ResNets. A row that is there is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import io
import re
import tempfile
import time
import warnings
from pathlib import Path

from vision_peft.cli import main as vision_peft
from vision_peft.engine.adapter import method_names
from vision_peft.engine.store import read_config

ROWS, PAGE = Path("docs/rows/methods_on_backbones.csv"), Path("docs/methods_on_backbones.md")
FIELDS = ["backbone", "method", "sites", "trained", "loss", "seconds", "error"]
STEPS = 4
COMMON = (
    f"--trainer.max_steps {STEPS} --trainer.accelerator cpu --trainer.precision bf16-mixed --trainer.enable_progress_bar false "
    "--trainer.limit_val_batches 0 --trainer.callbacks null"
)
PICTURES = "--data.source CsvSource --data.source.file dtd10/split.csv --data.shots 2 --data.batch_size 8"
BACKBONES = {
    "clip": (
        "configs/task/fewshot_clip.yaml",
        f"--model.backbone.name ViT-B-32 --config {{folder}}/random.yaml {PICTURES}",
        "--adapter.targets attn+mlp",
    ),
    "conv": (
        "configs/task/fewshot_vit.yaml",
        f"--model.backbone.name offline:effnet_lite0 --model.backbone.image_size 96 --data.augment none {PICTURES}",
        "--adapter.targets conv",
    ),
    "generator": ("configs/task/generator_faces.yaml", "--model.backbone.name {generator} --model.samples 0 --data.batch_size 8", ""),
}
TITLES = {
    "clip": "CLIP ViT-B/32, random weights, both towers",
    "conv": "EfficientNet-Lite0, ImageNet weights, every convolution",
    "generator": "The offline generator of faces (UNet2DModel), attention and convolutions",
}


def run(backbone: str, method: str, generator: str) -> dict[str, str]:
    task, options, targets = BACKBONES[backbone]
    out, start = io.StringIO(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        warnings.simplefilter("ignore")
        (Path(folder) / "random.yaml").write_text("model: {init_args: {backbone: {init_args: {weights: null}}}}")
        options = options.format(folder=folder, generator=generator)
        words = ["fit", "--config", task, "--config", f"configs/method/{method}.yaml", *f"{options} {COMMON} {targets}".split()]
        code = vision_peft([*words, "--run", f"{folder}/run"])
        if code:
            return {"error": out.getvalue().strip().splitlines()[-1].removeprefix("vision-peft: error: ")}
        stored = read_config(Path(folder) / "run" / "adapter")
        card = (Path(folder) / "run" / "adapter" / "README.md").read_text()
    return {
        "sites": str(len(stored["sites"])),
        "trained": re.search(r"([\d,]+) trained numbers", card)[1].replace(",", ""),
        "loss": f"{stored['metrics']['train/loss']:.3f}",
        "seconds": f"{time.perf_counter() - start:.0f}",
    }


def rows() -> list[dict[str, str]]:
    return list(csv.DictReader(ROWS.open())) if ROWS.is_file() else []


def cells(row: dict[str, str]) -> list[str]:
    if row["error"]:
        return [f"refused: {row['error']}", "", "", ""]
    return [row["sites"], f"{int(row['trained']):,}", row["loss"], row["seconds"]]


def write_page() -> None:
    text = [
        "# Every method on the other kinds of backbone",
        "",
        f"`python scripts/each_backbone.py`: {STEPS} steps of `vision-peft fit`, batch 8, one thread, other jobs beside it; the adapter",
        "folder was written and read back. On dtd10 in bf16; of the generator on ten smiling faces, in float32. Seconds: the command after",
        "its imports. The loss says that the run went on, not how good a method is.",
        "",
    ]
    for backbone, title in TITLES.items():
        of = sorted((row for row in rows() if row["backbone"] == backbone), key=lambda row: row["method"])
        text += [f"## {title}", "", f"{sum(not row['error'] for row in of)} of {len(of)} methods ran.", ""]
        text += ["| method | sites | trained numbers | loss after | s |", "| --- | ---: | ---: | ---: | ---: |"]
        text += [f"| {row['method']} | {' | '.join(cells(row))} |" for row in of]
        text.append("")
    PAGE.write_text("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=method_names())
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--generator", default="checkpoints/offline_ddpm/pipeline")
    parser.add_argument("--write", action="store_true", help="write the page from the rows")
    args = parser.parse_args()
    if args.write:
        write_page()
        return
    known = {(row["backbone"], row["method"]) for row in rows()}
    fresh = not ROWS.exists()
    with ROWS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        for backbone in args.backbones:
            for method in args.only:
                if (backbone, method) not in known:
                    gc.collect()  # a run leaves cycles that hold its whole network
                    row = {"backbone": backbone, "method": method, **run(backbone, method, args.generator)}
                    writer.writerow(row)
                    file.flush()
                    print(" ".join(value for value in row.values() if value), flush=True)


if __name__ == "__main__":
    main()
