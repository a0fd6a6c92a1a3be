"""docs/results_generators.md: adaptation of the offline generator of faces, every run, its measures and its grids.

    VISION_PEFT_DATA=... python scripts/table_generators.py --generator checkpoints/offline_ddpm/pipeline --folder checkpoints/generators
    python scripts/table_generators.py --latent checkpoints/offline_latent_ddpm    # samples and curve of a generator of latents
    python scripts/table_generators.py            # the page anew, from docs/rows

Runs that are finished are not repeated; one that was stopped goes on. Hybrid adaptation is measured on two pairs of domains: the source, an
adapter of each domain alone, mixes of these two adapters, and the hybrid, all from the same 64 seeds.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from vision_peft.backbones import Diffusion, Vit
from vision_peft.data.generator_images import load_pictures, read_pictures
from vision_peft.engine.install import activate, frozen_weights, installed
from vision_peft.engine.store import load_adapter, read_config
from vision_peft.errors import UserError
from vision_peft.generation.acts import ALWAYS, Acts, acts_of
from vision_peft.generation.evaluation import Domain, compare_pictures
from vision_peft.generation.picture_encoder import PictureEncoder
from vision_peft.generation.sampling import draw_noise, pictures
from vision_peft.report.picture_grid import save_grid

ROOT = Path(__file__).parents[1]
HEAD, PAGE, ROWS = ROOT / "scripts" / "results_generators_head.md", ROOT / "docs" / "results_generators.md", ROOT / "docs" / "rows"
IMAGES, COUNT, SHOWN, SEED = "gen_faces/split.csv", 64, 9, 2
PAIRS = {"faces": ("smile", "sunglasses"), "styles": ("sketches_tight", "sunglasses")}
DOMAINS = {"faces": "{smile: 1.0, sunglasses: 1.0}", "styles": "{sketches_tight: 1.0, sunglasses: 1.0}"}
# a smile is at its place in aligned faces, a style is everywhere: means over places there
MEANS = "[{class_path: vision_peft.backbones.Vit, init_args: {name: 'offline:dinov2_vits14', image_size: 98, pool: avg, depth: 12}}, " \
    "{class_path: vision_peft.backbones.Vit, init_args: {name: 'offline:effnet_lite0', image_size: 96, pool: default}}]"
ENCODERS = {"faces": [], "styles": ["--model.encoders", MEANS]}
METHODS = {
    "lora": "{class_path: LoRA, init_args: {rank: 4, alpha: 4}}",
    "dora": "{class_path: DoRA, init_args: {rank: 4, alpha: 4}}",
    "tlora": "{class_path: TLoRA, init_args: {transform_rank: 1, rank: 4}}",
    "svfit": "SVFit",
}
RATES = {"lora": 1e-3, "dora": 1e-3, "tlora": 1e-3, "svfit": 3e-2}


def fit(folder: Path, config: str, *words: str) -> None:
    if (folder / "adapter").is_dir():
        return
    stopped = ["--resume", str(folder)] if (folder / "checkpoints" / "last.ckpt").is_file() else None
    started = ["--config", str(ROOT / "configs" / config), "--config", str(ROOT / "configs" / "trainer" / "cpu.yaml"), "--run", str(folder)]
    subprocess.run([sys.executable, "-m", "vision_peft.cli", "fit", *(stopped or [*started, *words])], check=True)


def run_all(generator: Path, folder: Path) -> None:
    name = ["--model.backbone.name", str(generator)]
    for method, chosen in METHODS.items():
        own = ["--adapter.method", chosen, "--model.optimizer.init_args.lr", str(RATES[method])]
        fit(folder / f"fit_{method}", "task/generator_faces.yaml", *name, "--data.domain", "sunglasses", *own)
    for pair, domains in PAIRS.items():
        hybrid = [] if pair == "faces" else ["--data.hybrid", "null"]  # of faces there are real pictures of it
        fit(folder / pair, "task/hybrid_faces.yaml", *name, *ENCODERS[pair], "--data.domains", DOMAINS[pair], *hybrid)
        for domain in domains:
            alone = ["--data.domains", f"[{domain}]", "--data.hybrid", "null"]
            fit(folder / f"{pair}_{domain}", "task/hybrid_faces.yaml", *name, *ENCODERS[pair], *alone)


def real(domain: str, split: str, size: int) -> Tensor:
    return load_pictures(read_pictures(IMAGES, "images", domain, split), size).float() / 127.5 - 1


def held_out(domain: str, size: int) -> Tensor:
    """Pictures that were not trained on; of a style, which has none, those that were."""
    try:
        return real(domain, "ref", size)
    except UserError:
        return real(domain, "shot", size)


class Detector:
    """Whether a picture is of a domain, by logistic regression on features of real pictures of it and of the source."""

    def __init__(self, encoder: PictureEncoder, domain: str, size: int) -> None:
        positive = torch.cat([real(domain, "shot", size), held_out(domain, size)])
        negative = real("source", "val", size)
        features = encoder.many(torch.cat([positive, positive.flip(3), negative, negative.flip(3)]))
        labels = [1] * 2 * len(positive) + [0] * 2 * len(negative)
        self.encoder, self.model = encoder, LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000).fit(features.numpy(), labels)

    def share(self, images: Tensor) -> float:
        return float(self.model.predict(self.encoder.many(images).numpy()).mean())


def measure(generator: Path, folder: Path) -> None:
    backbone = Diffusion(str(generator))
    backbone.load()
    backbone.eval()
    size = backbone.preprocess.size
    judge = Vit("offline:effnet_lite0", image_size=160)
    judge.load()
    encoder = PictureEncoder(judge)
    noise = draw_noise(backbone, COUNT, SEED)
    for path in sorted(folder.glob("*/adapter")):
        load_adapter(backbone.network, path, sites=backbone.sites(), name=path.parent.name)

    def show(mix: Mapping[str, float], acts: Acts = ALWAYS) -> Tensor:
        if not mix:
            with frozen_weights(backbone.network):
                return pictures(backbone, noise, [""] * COUNT)
        activate(backbone.network, mix)
        return pictures(backbone, noise, [""] * COUNT, acts=acts)

    source = show({})
    rows = []
    for pair, (first, second) in PAIRS.items():
        acts = acts_of(read_config(folder / pair / "adapter"), folder / pair)
        one, other = f"{pair}_{first}", f"{pair}_{second}"
        mixes = {f"{first} alone": {one: 1.0}, f"{second} alone": {other: 1.0}, "half of each": {one: 0.5, other: 0.5}}
        mixes |= {"sum of both": {one: 1.0, other: 1.0}, "hybrid": {pair: 1.0}}
        shown = {"source": source} | {title: show(mix, acts) for title, mix in mixes.items()}
        shown["hybrid at all times"] = show({pair: 1.0})
        domains = {domain: Domain(real(domain, "shot", size), held_out(domain, size)) for domain in (first, second)}
        detectors = {domain: Detector(encoder, domain, size) for domain in (first, second)}
        hybrid = real("smile+sunglasses", "ref", size) if pair == "faces" else None
        for title, images in shown.items():
            found = compare_pictures(encoder, source, images, domains, hybrid)
            found |= {f"detected/{domain}": detector.share(images) for domain, detector in detectors.items()}
            rows += [{"pair": pair, "row": title, "measure": key, "value": value} for key, value in found.items()]
        save_grid({title: images[:SHOWN] for title, images in shown.items()}, ROOT / "docs" / f"generators_{pair}.png")
    domain = {"sunglasses": Domain(real("sunglasses", "shot", size), held_out("sunglasses", size))}
    detector, shown = Detector(encoder, "sunglasses", size), {"source": source}
    for method in METHODS:
        shown[method] = show({f"fit_{method}": 1.0})
    for title, images in shown.items():
        found = compare_pictures(encoder, source, images, domain) | {"detected/sunglasses": detector.share(images)}
        if title in METHODS:
            trained = installed(backbone.network)[f"fit_{title}"].num_trainable()
            found |= {"trained": trained, "seconds": _seconds(folder / f"fit_{title}")}
        rows += [{"pair": "fine-tuning", "row": title, "measure": key, "value": value} for key, value in found.items()]
    save_grid({title: images[:SHOWN] for title, images in shown.items()}, ROOT / "docs" / "generators_fine_tuning.png")
    with (ROWS / "generators.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["pair", "row", "measure", "value"])
        writer.writeheader()
        writer.writerows(rows)


def _seconds(run: Path) -> float:
    """Between the first and the last line of the log, which tensorboard dates."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    times = []
    for file in (run / "tensorboard").glob("events*"):
        events = EventAccumulator(str(file))
        events.Reload()
        times += [each.wall_time for tag in events.Tags()["scalars"] for each in events.Scalars(tag)]
    return max(times) - min(times)


KEPT = ("consistency", "structure", "diversity", "copied")
SHOWN_MEASURES = {
    "faces": ("detected", "distance", "similarity", "kid", "similarity/hybrid", "kid/hybrid", *KEPT),
    "styles": ("detected", "distance", "similarity", "kid", *KEPT),
    "fine-tuning": ("trained", "seconds", "detected", "kid", "similarity", *KEPT),
}


def table(pair: str) -> str:
    """A row a generator; a measure of domains has a column for each."""
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader((ROWS / "generators.csv").open()):
        if row["pair"] == pair:
            found.setdefault(row["row"], {})[row["measure"]] = float(row["value"])
    domains = PAIRS.get(pair, ("sunglasses",))
    columns = []
    for measure in SHOWN_MEASURES[pair]:
        several = [f"{measure}/{domain}" for domain in domains]
        columns += several if any(several[0] in values for values in found.values()) else [measure]
    lines = [f"| generator | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for title, values in found.items():
        lines.append(f"| {title} | {' | '.join(_cell(column, values.get(column)) for column in columns)} |")
    return "\n".join(lines)


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return ""
    if column in ("trained", "seconds"):
        return f"{value:,.0f}"
    return f"{100 * value:.0f} %" if column.startswith(("detected", "copied")) else f"{1000 * value if 'kid' in column else value:.3f}"


def training(name: str) -> str:
    lines = ["| step | loss | held-out loss | CPU seconds |", "| ---: | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(row)} |" for row in csv.reader((ROWS / f"{name}.csv").open())]
    return "\n".join(lines)


def keep_training(work: Path, name: str, picture: str) -> None:
    """The curve and the last samples of a generator's training."""
    shutil.copy(work / "log.csv", ROWS / f"{name}.csv")
    shutil.copy(max(work.glob("samples_*.png")), ROOT / "docs" / picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", type=Path, help="a pipeline of scripts/train_offline_ddpm.py")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints/generators"), help="for the runs")
    parser.add_argument("--latent", type=Path, help="a folder of scripts/train_offline_ddpm.py --autoencoder")
    given = parser.parse_args()
    if given.generator is not None:
        run_all(given.generator, given.folder)
        measure(given.generator, given.folder)
        keep_training(given.generator.parent / "work", "generator_training", "generator_samples.png")
    if given.latent is not None:
        keep_training(given.latent / "work", "generator_latent_training", "generator_latent_samples.png")
    text = HEAD.read_text()
    parts = {pair: table(pair) for pair in (*PAIRS, "fine-tuning")}
    parts |= {name: training(f"generator_{name}") for name in ("training", "latent_training")}
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
