"""`vision-peft quality`: image quality without a reference, from opinion scores to a score for any picture.

  vision-peft quality extract --scores biq2021/split.csv --experts offline:effnet_lite0 offline:dinov2_vits14 --folder checkpoints/quality
  vision-peft quality fit --scores biq2021/split.csv --features checkpoints/quality --regressor checkpoints/quality/regressor
  vision-peft quality score PICTURES... --regressor checkpoints/quality/regressor [--csv scores.csv] [--html sheet.html]
  vision-peft quality sensitivity PICTURES... --regressor checkpoints/quality/regressor     # do scores fall as pictures are spoilt?
  vision-peft quality distort pristine/split.csv --folder checkpoints/distorted       # a set with known levels, where opinions are none
"""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

from vision_peft.allocator import keep_freed_memory
from vision_peft.commands.columns import columns
from vision_peft.commands.parser import CommandParser
from vision_peft.errors import UserError


def main(command: str, argv: list[str]) -> None:
    verbs = {"extract": _extract, "fit": _fit, "score": _score, "sensitivity": _sensitivity, "distort": _distort}
    if argv and argv[0] in verbs:
        keep_freed_memory()
        verbs[argv[0]](argv[1:])
        return
    parser = CommandParser(command, __doc__, usage=f"vision-peft quality {{{','.join(verbs)}}} [options]")
    parser.add_argument("verb", choices=verbs, help="`vision-peft quality VERB --help` tells its options")
    parser.parse_args(argv[:1])


def _extract(argv: list[str]) -> None:
    about = "extract: features of pictures by frozen experts, at full and half size; goes on where it was stopped."
    parser = CommandParser("quality extract", about)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--scores", help="CSV with path and mos; a relative path starts at VISION_PEFT_DATA")
    source.add_argument("--images", type=Path, help="a folder of pictures, at any depth")
    kinds = "timm or offline: names, random:NAME, adapter folders, RUN/encoder folders"
    parser.add_argument("--experts", nargs="+", required=True, help=f"in this order: {kinds}")
    parser.add_argument("--folder", type=Path, required=True, help="where the features go")
    parser.add_argument("--batch", type=int, default=8, help="pictures of one size at once")
    parser.add_argument("--tile", type=int, help="pixels: larger pictures pass in tiles of this side (less memory, slightly other numbers)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: faster, features differ by 1 to 6 %%")
    given = parser.parse_args(argv)
    if given.batch < 1:
        raise UserError(f"--batch: must be at least 1, not {given.batch}")
    _check_tile(given.tile)
    from vision_peft.data.images import list_images
    from vision_peft.quality.experts import open_expert
    from vision_peft.quality.extraction import extract
    from vision_peft.quality.opinions import read_opinions

    if given.images is not None and not given.images.is_dir():
        raise UserError(f"--images: {given.images} is no folder")
    paths = list_images(given.images) if given.images else [opinion.path for opinion in read_opinions(given.scores, "--scores")]
    if not paths:
        raise UserError(f"--images: no picture in {given.images}")
    found = extract(paths, [open_expert(name, given.tile, given.bf16) for name in given.experts], given.folder, given.batch)
    print(f"features: {given.folder} ({len(found.paths)} pictures, {found.values.shape[1]} numbers each)")


def _fit(argv: list[str]) -> None:
    about = "fit: ridge regression on opinion scores: medians over ten divisions of the set, then a regressor on all of it."
    parser = CommandParser("quality fit", about)
    parser.add_argument("--scores", required=True, help="the CSV that the features were extracted for")
    parser.add_argument("--features", type=Path, required=True, help="folder of quality extract")
    parser.add_argument("--regressor", type=Path, help="folder for the regressor on the whole set")
    parser.add_argument("--divisions", type=int, default=10)
    parser.add_argument("--lower_is_better", action="store_true", help="the scores are differences (DMOS)")
    given = parser.parse_args(argv)
    from vision_peft.quality.extraction import load_extracted
    from vision_peft.quality.opinions import read_opinions
    from vision_peft.quality.trial import final, medians, trials

    if given.divisions < 2:
        raise UserError(f"--divisions: must be at least 2, not {given.divisions}")
    opinions, extracted = read_opinions(given.scores, "--scores", given.lower_is_better), load_extracted(given.features)
    places = {path: index for index, path in enumerate(extracted.paths)}
    missing = [opinion.path for opinion in opinions if str(opinion.path) not in places]
    if missing:
        raise UserError(f"{given.features}: holds no features of {missing[0]} ({len(missing)} of {len(opinions)} are missing)")
    features = extracted.values[[places[str(opinion.path)] for opinion in opinions]]
    rows = trials(opinions, features, range(given.divisions))
    names = " + ".join(each["name"] for each in extracted.experts)
    table = [(name, f"{median:.3f}", f"{spread:.3f}") for name, (median, spread) in medians(rows).items()]
    print(f"{names}: {len(opinions)} pictures, {given.divisions} divisions 70/10/20")
    print(columns([("measure", "median", "deviation"), *table]))
    if given.regressor is not None:
        scores = [opinion.score for opinion in opinions]
        alpha = statistics.median_low([row["alpha"] for row in rows])
        regressor = final(opinions, features, alpha)
        regressor.facts["experts"] = extracted.experts
        regressor.facts["scores"] = {"lowest": min(scores), "highest": max(scores), "file": given.scores}
        regressor.save(given.regressor)
        print(f"regressor: {given.regressor} (strength {alpha:g})")


def _score(argv: list[str]) -> None:
    about = "score: a score a picture, in the unit of the opinions that the regressor was fitted to; higher is better."
    parser = CommandParser("quality score", about)
    parser.add_argument("images", nargs="+", type=Path, help="pictures or folders of them")
    parser.add_argument("--regressor", type=Path, required=True)
    parser.add_argument("--tile", type=int, help="pixels: larger pictures pass in tiles of this side; else as for the regressor's")
    parser.add_argument("--csv", type=Path, help="write path,score")
    parser.add_argument("--html", type=Path, help="write a contact sheet, best first")
    given = parser.parse_args(argv)
    from vision_peft.data.images import load_rgb
    from vision_peft.data.records import Record
    from vision_peft.quality.scorer import Scorer
    from vision_peft.report.contact_sheet import write_contact_sheet

    _check_tile(given.tile)
    scorer = Scorer(given.regressor, given.tile)
    scored = []
    for path in _pictures(given.images):
        try:
            score = float(scorer([load_rgb(Record(path, -1))])[0])
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        scored.append((path, score))
        print(f"{score:9.4f}  {path}")
    if given.csv is not None:
        with given.csv.open("w", newline="") as file:
            csv.writer(file).writerows([("path", "score"), *((path, f"{score:.6g}") for path, score in scored)])
    if given.html is not None:
        ranked = sorted(scored, key=lambda each: -each[1])
        write_contact_sheet([(path.name, score, load_rgb(Record(path, -1))) for path, score in ranked], given.html)
        print(f"contact sheet: {given.html}")


def _sensitivity(argv: list[str]) -> None:
    about = "sensitivity: scores of clean pictures under every distortion of the bank at levels 1 to 5; how steadily they fall."
    parser = CommandParser("quality sensitivity", about)
    parser.add_argument("images", nargs="+", type=Path, help="clean pictures, folders of them, or a CSV with path and split (its val part)")
    parser.add_argument("--regressor", type=Path, required=True)
    given = parser.parse_args(argv)
    from vision_peft.data.images import load_rgb
    from vision_peft.data.records import Record
    from vision_peft.quality.scorer import Scorer
    from vision_peft.quality.sensitivity import sensitivity

    scorer = Scorer(given.regressor)
    found = sensitivity(scorer, [load_rgb(Record(path, -1)) for path in _pictures(given.images)])
    rows = [(each.name, *(f"{mean:.3f}" for mean in each.means), "yes" if each.falls else "no", f"{each.spearman:+.2f}") for each in found]
    print(columns([("distortion", "clean", *(f"level {level}" for level in range(1, 6)), "falls", "spearman"), *rows]))
    print(f"falls from level to level: {sum(each.falls for each in found)} of {len(found)} distortions")


def _distort(argv: list[str]) -> None:
    about = "distort: clean pictures under distortions of the bank, and a CSV whose score is 6 less the level (6: the clean one)."
    parser = CommandParser("quality distort", about)
    parser.add_argument("images", nargs="+", type=Path, help="clean pictures, folders of them, or a CSV with path and split")
    parser.add_argument("--folder", type=Path, required=True, help="gets images/ and split.csv")
    parser.add_argument("--split", default="train", help="of a CSV")
    parser.add_argument("--kinds", nargs="+", help="distortions; default: all whose level is a strength")
    parser.add_argument("--levels", type=int, default=5, help="how many of the five a picture and distortion, drawn by the seed")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(argv)
    from vision_peft.quality.distorted_set import write_distorted

    count = write_distorted(_pictures(given.images, given.split), given.folder, given.kinds, given.levels, given.seed)
    print(f"distorted: {given.folder} ({count} pictures)")


def _check_tile(tile: int | None) -> None:
    if tile is not None and tile < 64:
        raise UserError(f"--tile: must be at least 64 pixels, not {tile}")


def _pictures(given: list[Path], split: str = "val") -> list[Path]:
    """Pictures, those below folders, and those of a split that CSV files list."""
    from vision_peft.data.images import list_images
    from vision_peft.data.pristine_images import pictures_of

    paths: list[Path] = []
    for each in given:
        paths += pictures_of(each, split) if each.suffix == ".csv" else list_images(each) if each.is_dir() else [each]
    if not paths:
        raise UserError(f"{given[0]}: no picture in it")
    return paths
