"""A set is made in a hidden folder beside its place and put there whole; what a killed run left behind, the next one clears away."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vision_peft.errors import UserError
from vision_peft.processes import alive


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new hidden folder beside `target`, named by this process, which is removed at the end unless it was published."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = _beside(target, "unpacking")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, target: Path) -> None:
    """Put a finished folder in the place of `target`. An old one is moved aside, and removed once the new one is there.

    As replace_folder of engine/store.py, but a set is too large to lose to an interruption between the two moves: clear_stale() undoes
    the first.
    """
    aside = _beside(target, "old")
    try:
        if target.exists():
            os.replace(target, aside)
        os.replace(folder, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.replace(aside, target)
        raise
    _remove(aside)


def clear_stale(target: Path) -> None:
    """Remove hidden folders of runs that are gone; an old set that a killed run had moved aside comes back.

    Raises:
        UserError: a run on this machine is still at it.
    """
    for folder in sorted(target.parent.glob(f".{target.name}.unpacking.*")):
        host, _, process = folder.name.partition(".unpacking.")[2].rpartition(".")
        if host != socket.gethostname():
            print(f"{folder}: left there, for a run on {host or 'another machine'} may be writing it; remove it if there is none")
        elif process.isdigit() and int(process) != os.getpid() and alive(int(process)):
            raise UserError(f"{folder}: process {process} is preparing this set; wait for it or end it")
        else:
            shutil.rmtree(folder)
            print(f"removed {folder}, which an interrupted run had left")
    for aside in sorted(target.parent.glob(f".{target.name}.old.*")):
        if target.exists():
            _remove(aside)
            print(f"removed {aside}, which an interrupted run had replaced")
        else:
            os.replace(aside, target)
            print(f"put {target} back, which an interrupted run had moved aside")


def _beside(target: Path, purpose: str) -> Path:
    return target.with_name(f".{target.name}.{purpose}.{socket.gethostname()}.{os.getpid()}")


def _remove(folder: Path) -> None:
    """A set may be a link to a folder elsewhere: then only the link goes."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
