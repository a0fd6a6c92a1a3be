"""`vision-peft data`: known sets of few-shot classification, vessels and image quality, from published archives to the layouts read here.

Archives are fetched by hand (datasets/README.md says from where), unpacked and counted by `prepare`; `list` tells what there is.

  vision-peft data list
  vision-peft data prepare caltech101 --archive caltech-101.zip --splits split_zhou_Caltech101.json
"""

from __future__ import annotations

from pathlib import Path

from vision_peft.commands.columns import columns
from vision_peft.commands.parser import CommandParser
from vision_peft.data.known_sets import KNOWN_SETS
from vision_peft.data.prepare import prepare
from vision_peft.data.roots import VARIABLE, data_root
from vision_peft.errors import UserError

ROOT_HELP = f"folder that holds the sets' folders; by default {VARIABLE}"


def main(command: str, argv: list[str]) -> None:
    verbs = {"list": _list, "prepare": _prepare}
    if argv and argv[0] in verbs:
        verbs[argv[0]](argv[1:])
        return
    parser = CommandParser(command, __doc__, usage="vision-peft data {list,prepare} [options]")
    parser.add_argument("verb", choices=verbs, help="`vision-peft data VERB --help` tells its options")
    parser.parse_args(argv[:1])


def _list(argv: list[str]) -> None:
    parser = CommandParser("data list", "list: the known sets, where they are, their counts and the archives they come as.")
    parser.add_argument("--root", type=Path, help=ROOT_HELP)
    root = parser.parse_args(argv).root or data_root()
    rows = []
    for name, known in KNOWN_SETS.items():
        folder = known.folder(root)
        counts = [count or "-" for count in known.counts]
        rows.append((name, folder.name if folder.exists() else "-", *counts, known.placement.split_file or "-", known.placement.archives))
    print(columns([("set", "folder", *(f"{field}" for field in known.counts._fields), "split file", "comes as"), *rows]))
    print(f"\nFolders are those in {root}. The counts are recalled from CoOp's paper and the sets' descriptions, not certain.")


def _prepare(argv: list[str]) -> None:
    parser = CommandParser(
        "data prepare",
        "prepare: unpacks a set's archives, reads it back, compares its counts with the table, and puts it in its place whole.",
        usage="vision-peft data prepare NAME --archive FILE [--archive FILE ...] [--splits FILE] [--root FOLDER] [options]",
    )
    parser.add_argument("name", help=", ".join(KNOWN_SETS))
    parser.add_argument("--archive", type=Path, action="append", required=True, metavar="FILE", help="as published; repeat for several")
    parser.add_argument("--splits", type=Path, metavar="FILE", help="CoOp's split_zhou_X.json, if not in root or archives")
    parser.add_argument("--root", type=Path, metavar="FOLDER", help=ROOT_HELP)
    parser.add_argument("--replace", action="store_true", help="put the new set in the place of one that is there")
    parser.add_argument("--accept_counts", action="store_true", help="install a set whose counts differ, with a warning")
    given = parser.parse_args(argv)
    options = {"root": given.root, "splits": given.splits, "replace": given.replace, "accept_counts": given.accept_counts}
    try:
        prepare(given.name, given.archive, **options)
    except KeyboardInterrupt:
        raise UserError(f"{given.name}: interrupted and not installed; the same command starts anew") from None
