"""The files inside a zip or tar, and inside the archives within it, one after another; nothing is written but where a caller says.

A nested archive counts as a folder: `caltech-101.zip/caltech-101/101_ObjectCategories.tar.gz/101_ObjectCategories/crab/image_0001.jpg`.
No temporary file is needed for it. Archives are not trusted: links and devices are never followed, and a name that leads out of the
archive refuses the whole of it.
"""

from __future__ import annotations

import gzip
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from tqdm import tqdm

from vision_peft.errors import UserError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
DEEPEST = 3  # archives within archives; public ones need 1, and an archive can be made that holds itself
BAR_FROM = 50_000_000  # bytes of an archive; smaller ones are done before a bar could be read
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, NotImplementedError)


@dataclass(frozen=True)
class Member:
    """One file of an archive; its content can be read until the next member is asked for.

    Attributes:
        path: the archive as it was given, then the path inside, with "/"; for a file that is no archive, the file itself.
        size: bytes.
        regular: False for a link or a device, which has no content here.
    """

    path: str
    size: int
    regular: bool
    open: Callable[[], IO[bytes]] = field(repr=False)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def read(self) -> bytes:
        with _named(self.path), self.open() as stream:
            return stream.read()

    def write(self, target: Path) -> None:
        """Write the content to `target`, making the folders above it."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with _named(self.path), self.open() as stream, target.open("wb") as sink:
            shutil.copyfileobj(stream, sink, 1 << 20)


def members(archive: Path, title: str) -> Iterator[Member]:
    """Every file in `archive`, in its order; a file without an archive's suffix is its own only member.

    Args:
        title: of the progress bar, which counts bytes of the archive.

    Raises:
        UserError: damaged, cut short, encrypted, or with a name that leads out of it.
    """
    size = archive.stat().st_size
    bar = tqdm(total=size, desc=f"{title} {archive.name}", unit="B", unit_scale=True, dynamic_ncols=True, disable=size < BAR_FROM)
    with _named(str(archive)), archive.open("rb") as raw, bar:
        if not is_archive(archive.name):
            yield Member(str(archive), size, True, partial(archive.open, "rb"))
            return
        for member in _walk(raw, str(archive), 0):
            yield member
            bar.update(raw.tell() - bar.n)


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _walk(stream: IO[bytes], inside: str, depth: int) -> Iterator[Member]:
    if depth > DEEPEST:
        raise UserError(f"{inside}: archives within archives, deeper than {DEEPEST}: refused")
    magic = stream.read(2)
    stream.seek(0)
    files = _zipped(stream, inside) if magic == b"PK" else _tarred(stream, inside, "r:gz" if magic == b"\x1f\x8b" else "r:")
    for member in files:
        if member.name.startswith("._"):  # macOS keeps attributes of x.tar.gz in ._x.tar.gz, which is no archive
            continue
        if member.regular and is_archive(member.name):
            with _named(member.path), member.open() as inner:
                yield from _walk(inner, member.path, depth + 1)
        else:
            yield member


def _zipped(stream: IO[bytes], inside: str) -> Iterator[Member]:
    with zipfile.ZipFile(stream) as archive:
        for info in archive.infolist():
            if info.flag_bits & 1:
                raise zipfile.BadZipFile(f"{info.filename} is encrypted")
            if not info.is_dir():
                link = stat.S_ISLNK(info.external_attr >> 16)
                yield Member(_below(inside, info.filename), info.file_size, not link, partial(archive.open, info))


def _tarred(stream: IO[bytes], inside: str, mode: str) -> Iterator[Member]:
    with tarfile.open(fileobj=stream, mode=mode, tarinfo=_Header) as archive:
        for info in archive:
            if not info.isdir():
                yield Member(_below(inside, info.name), info.size, info.isreg(), partial(archive.extractfile, info))
        while archive.fileobj.read(1 << 20):  # gzip's checksum stands behind the last byte, and is compared when that is read
            pass


class _Header(tarfile.TarInfo):
    """A header that is an error where it is damaged: tarfile would take it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):
                raise tarfile.ReadError(str(error)) from error
            raise  # zeros, which are the end


def _below(inside: str, name: str) -> str:
    parts = [part for part in re.split(r"[\\/]", name) if part not in ("", ".")]
    if ".." in parts or not parts or re.match(r"[\\/]|[A-Za-z]:", name):
        raise UserError(f"{inside}: holds {name!r}, which leads out of the folder it is unpacked in: refused")
    return "/".join([inside, *parts])


@contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise UserError(f"{path}: damaged, cut short or no archive of its kind ({error}); get it again") from error
