"""Decode every picture before training starts, once: what has been seen to decode is remembered between runs."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vision_peft.data.images import BadImage, load_rgb
from vision_peft.data.parallel import map_threads
from vision_peft.data.records import Record
from vision_peft.errors import UserError
from vision_peft.user_cache import cache_folder


def verify(records: Sequence[Record], bad_images: Literal["error", "skip"] = "error") -> list[Record]:
    """The records whose pictures decode, in order.

    Each file is decoded to its last row, with a progress bar above 500 files. A file that decodes is remembered by its path,
    modification time and size, so a second run only looks at new and changed files, and at bad ones.

    Args:
        records: may repeat a picture; it is decoded once.
        bad_images: "error" raises on bad pictures; "skip" leaves them out and warns, naming each.

    Raises:
        UserError: names the first bad picture, why it is bad, and how many there are.
    """
    memory = _Memory()
    files = {record.path: record for record in records if record.pixels is None}
    # Keys are taken before decoding: a file that changes meanwhile must not be remembered under its new state.
    keys = {path: _key(path) for path in files}
    unknown = [record for path, record in files.items() if keys[path] not in memory.known]
    reasons = {record.path: reason for record, reason in zip(unknown, map_threads(_reason, unknown, "checking pictures")) if reason}
    memory.add([key for record in unknown if record.path not in reasons and (key := keys[record.path])])
    if reasons and bad_images == "error":
        total = f"1 bad picture among {len(files)}" if len(reasons) == 1 else f"{len(reasons)} bad pictures among {len(files)}"
        raise UserError(f"{next(iter(reasons.values()))}: {total}; mend or remove, or set data.bad_images: skip")
    if reasons:
        warnings.warn("\n".join([f"left out {len(reasons)} bad pictures:", *reasons.values()]), stacklevel=2)
    return [record for record in records if record.path not in reasons]


def _reason(record: Record) -> str | None:
    try:
        load_rgb(record)
    except BadImage as error:
        return str(error)
    return None


def _key(path: Path) -> str | None:
    """Digest of path, modification time and size; None for a file that cannot be looked at (decoding it will say what is wrong)."""
    try:
        state = path.stat()
    except OSError:
        return None
    return hashlib.blake2b(f"{os.path.abspath(path)}\n{state.st_mtime_ns}\n{state.st_size}".encode(), digest_size=16).hexdigest()


class _Memory:
    """Keys of the files that have been seen to decode, one a line of `verified.txt` in the cache folder (VISION_PEFT_CACHE).

    Lines are only ever appended, so several processes can share the file; should two appends run into each other, the spoilt lines
    match nothing and their pictures are looked at again. Keys of changed or removed files stay behind and match nothing either.
    """

    def __init__(self) -> None:
        self.file = cache_folder() / "verified.txt"
        self.known = set(self.file.read_text(encoding="ascii", errors="replace").split()) if self.file.is_file() else set()

    def add(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="ascii") as stream:
                stream.writelines(f"{key}\n" for key in keys)
        except OSError as error:
            warnings.warn(f"{self.file}: cannot be written ({error}); pictures will be checked again next time", stacklevel=3)
