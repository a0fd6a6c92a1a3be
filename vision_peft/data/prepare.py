"""From public archives to a set in the layout that its source reads: listed first, then unpacked, read back, counted, installed whole."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from vision_peft.data.archives import members
from vision_peft.data.known_sets import Counts, KnownSet, known_set
from vision_peft.data.placement import Text
from vision_peft.data.roots import data_root
from vision_peft.data.staging import clear_stale, publish, staging
from vision_peft.errors import UserError, nearest

BLOCK = 4096  # bytes; on most file systems a file takes a multiple of it


def prepare(
    name: str,
    archives: Sequence[Path],
    *,
    root: Path | None = None,
    splits: Path | None = None,
    replace: bool = False,
    accept_counts: bool = False,
) -> None:
    """Install the set `name`, and print what is done. A set that is there already is only counted.

    Nothing is unpacked before all archives have been listed, every picture of the set has been found in them, and there is room. The
    set appears in its place whole or not at all, whenever the process ends.

    Args:
        archives: .zip, .tar, .tgz, .tar.gz, in any order, with others in them; single files (the devkit's) may be given like archives.
        root: the folder that holds the sets' folders; None: VISION_PEFT_DATA.
        splits: CoOp's split file; None looks in `root`, in the set's folder and in the archives, in this order.
        replace: put a new set in the place of one that is there.
        accept_counts: install a set whose counts differ from the table, with a warning.

    Raises:
        UserError: in one line: bad options, a damaged archive, missing pictures, no room, other counts.
    """
    known = known_set(name)
    root = (data_root() if root is None else root.expanduser()).absolute()
    _check_options(known, archives, splits)
    try:
        for spelling in known.folders:
            clear_stale(root / spelling)
        target = known.folder(root)
        if _occupied(known, target) and not replace:
            _count_present(known, target)
            return
        _check_outside(archives, target)
        _install(known, archives, _given_texts(known, root, splits), target, replace, accept_counts)
    except OSError as error:
        raise UserError(f"{name}: not installed ({error})") from error


def _check_options(known: KnownSet, archives: Sequence[Path], splits: Path | None) -> None:
    for key, file in [*(("--archive", each) for each in archives), *([("--splits", splits)] if splits else [])]:
        if not file.is_file():
            siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
            raise UserError(f"{key}: {file} is no file{nearest(file.name, siblings)}")
    if len({each.resolve() for each in archives}) < len(archives):
        raise UserError(f"--archive: the same file twice among {', '.join(map(str, archives))}")
    if splits and known.placement.split_file is None:
        raise UserError(f"--splits: {splits}: {known.name} has no such file, its lists are in its archives: leave it out")


def _occupied(known: KnownSet, target: Path) -> bool:
    """Whether something is there that must not be lost; a split file alone is taken over into the new set."""
    return target.exists() and not (target.is_dir() and {each.name for each in target.iterdir()} <= {known.placement.split_file})


def _count_present(known: KnownSet, target: Path) -> None:
    try:
        print(f"{known.name} is already in {target}: {known.count(target)}; --replace puts a new one in its place")
    except UserError as error:
        raise UserError(f"{target}: is there, but is no whole {known.name} ({error}); --replace puts a new one in its place") from error


def _check_outside(archives: Sequence[Path], target: Path) -> None:
    for archive in archives:
        if archive.resolve().is_relative_to(target.resolve()):
            raise UserError(f"--archive: {archive} lies in {target}, which would be replaced: move it elsewhere")


def _given_texts(known: KnownSet, root: Path, splits: Path | None) -> dict[str, Text]:
    """The split file that the user names or has put in the root or the set's folder; empty where there is none."""
    name = known.placement.split_file
    if name is None:
        return {}
    places = [splits] if splits else [root / name, *(root / spelling / name for spelling in known.folders)]
    found = next((place for place in places if place.is_file()), None)
    return {name: Text(str(found), found.read_bytes())} if found else {}


def _install(
    known: KnownSet, archives: Sequence[Path], texts: dict[str, Text], target: Path, replace: bool, accept_counts: bool
) -> None:
    sizes = _list(known, archives, texts)
    placed = known.placement.place(sizes, texts)
    needed = _of_which(archives, [*placed.values(), *(text.origin for text in texts.values())])
    for archive in archives:
        if archive not in needed:
            print(f"{archive}: nothing in it is needed")
    _check_room(target, [sizes[member] for member in placed.values()])
    with staging(target) as folder:
        _unpack(archives, {member: folder / place for place, member in placed.items()})
        if known.placement.keeps_texts:
            for file, text in texts.items():
                (folder / file).write_bytes(text.content)
        try:
            known.placement.finish(folder)
            found = known.count(folder)
        except UserError as error:
            raise UserError(f"{known.name}: not installed: {str(error).replace(f'{folder}/', '')}") from error
        _compare(known, found, accept_counts)
        if _occupied(known, target) and not replace:
            raise UserError(f"{target}: has appeared meanwhile; --replace puts a new one in its place")
        publish(folder, target)
    print(f"{known.name} is in {target}: {found}")


def _of_which(archives: Sequence[Path], paths: Iterable[str]) -> set[Path]:
    """The archives that the members with these paths are from."""
    paths = list(paths)
    return {archive for archive in archives if any(each == str(archive) or each.startswith(f"{archive}/") for each in paths)}


def _list(known: KnownSet, archives: Sequence[Path], texts: dict[str, Text]) -> dict[str, int]:
    """{member: bytes} of all archives; the texts that the set needs and that were not given are added to `texts`."""
    sizes: dict[str, int] = {}
    lacking = set(known.placement.texts) - set(texts)
    for archive in archives:
        others = 0
        for member in members(archive, "reading"):
            if not member.regular:
                others += 1
                continue
            sizes[member.path] = member.size
            if member.name in lacking:
                text = Text(member.path, member.read())
                if texts.setdefault(member.name, text).content != text.content:
                    raise UserError(f"{member.path}: differs from {texts[member.name].origin}: leave out one of them")
        if others:
            print(f"{archive}: {others} links or devices in it are passed over")
    for missing in (each for each in known.placement.texts if each not in texts):
        more = ": give it by --splits FILE" if missing == known.placement.split_file else ""
        raise UserError(f"{missing} is not in the archives given{more}; {known.name} comes as {known.placement.archives}")
    return sizes


def _check_room(target: Path, sizes: Sequence[int]) -> None:
    there = next(parent for parent in target.parents if parent.exists())
    need, free = sum(-(-size // BLOCK) * BLOCK for size in sizes), shutil.disk_usage(there).free
    room = f"{len(sizes)} pictures need {tqdm.format_sizeof(need, 'B')}, {tqdm.format_sizeof(free, 'B')} are free"
    if need > free:
        raise UserError(f"{there}: no room: {room}")
    print(f"unpacking beside {target}: {room}")


def _unpack(archives: Sequence[Path], places: Mapping[str, Path]) -> None:
    needed = _of_which(archives, places)
    for archive in (each for each in archives if each in needed):
        for member in members(archive, "unpacking"):
            if member.path in places:
                member.write(places[member.path])


def _compare(known: KnownSet, found: Counts, accept: bool) -> None:
    """Announce counts that are as expected; refuse, or with `accept` warn of, others."""
    differing = [
        f"{key} {have} ({abs(have - want)} {'more' if have > want else 'fewer'} than {want})"
        for key, want, have in zip(Counts._fields, known.counts, found)
        if have != want
    ]
    if not differing:
        print(f"{known.name}: the counts are those recalled from {known.recalled_from}")
        return
    line = f"{known.name}: {', '.join(differing)}; the expected counts are recalled from {known.recalled_from}, not certain"
    if not accept:
        raise UserError(f"{line}: not installed; with --accept_counts it is")
    warnings.warn(line, stacklevel=2)
