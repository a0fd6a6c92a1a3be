"""Which file of the public archives becomes which file of a set, by the lists that come with it; other files are not kept."""

from __future__ import annotations

import io
import json
import re
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vision_peft.data.coop_split import LAYOUTS, SPLITS, CoopSplit
from vision_peft.data.images import SUFFIXES
from vision_peft.errors import UserError


class Text(NamedTuple):
    """A small file and where it was found, for messages."""

    origin: str
    content: bytes


class Placement(ABC):
    """The rule of one set.

    Attributes:
        texts: names of the small files that place() reads, wherever in the archives they are.
        keeps_texts: whether they are part of the set, in its folder.
        split_file: the one of them that does not come with the pictures, if any.
        archives: what the set comes as, for messages.
    """

    texts: tuple[str, ...]
    keeps_texts = True
    split_file: str | None = None

    def __init__(self, archives: str) -> None:
        self.archives = archives

    @abstractmethod
    def place(self, members: Iterable[str], texts: Mapping[str, Text]) -> dict[str, str]:
        """{file below the set's folder: the member it comes from}.

        Raises:
            UserError: a picture of the set is in none of the archives, or a text is not what its name says.
        """

    def finish(self, folder: Path) -> None:
        """What remains to be done in the unpacked set's folder; for most sets nothing."""
        return None

    def _by_name(self, names: list[str], images: str, members: Iterable[str], origin: str) -> dict[str, str]:
        """The members whose paths end in one of `names`, which go below `images`; those in a folder of that name come first."""
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{origin}: names {name!r}, which leads out of the set's folder: refused")
        wanted = {name: name if images == "." else f"{images}/{name}" for name in names}
        depths = {name.count("/") + 1 for name in wanted}
        found: dict[str, list[str]] = defaultdict(list)
        for member in members:
            parts = member.split("/")
            for name in ("/".join(parts[-depth:]) for depth in depths):
                if name in wanted:
                    found[wanted[name]].append(member)
        missing = [place for place in wanted.values() if place not in found]
        if missing:
            there = len(wanted) - len(missing)
            some = f"only {there} of its {len(wanted)} pictures are" if there else f"none of its {len(wanted)} pictures is"
            raise UserError(f"{origin}: {some} in the archives given, e.g. not {missing[0]}; this set comes as {self.archives}")
        return _one_each({place: [each for each in several if each.endswith(f"/{place}")] or several for place, several in found.items()})


class CoopPictures(Placement):
    """One of the nine sets with a published split file, which names its pictures."""

    def __init__(self, name: str, archives: str) -> None:
        super().__init__(archives)
        self.layout = LAYOUTS[name]
        self.split_file = f"split_zhou_{self.layout.name}.json"
        self.texts = (self.split_file,)

    def place(self, members: Iterable[str], texts: Mapping[str, Text]) -> dict[str, str]:
        origin, content = texts[self.texts[0]]
        try:
            splits = json.loads(content.decode("utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{origin}: not valid JSON ({error})") from error
        if not isinstance(splits, dict) or not all(isinstance(splits.get(split), list) for split in SPLITS):
            raise UserError(f"{origin}: expected an object with lists train, val, test")
        entries = [(entry, f"{origin}, {split}[{number}]") for split in SPLITS for number, entry in enumerate(splits[split])]
        names = [CoopSplit._entry(entry, where)[0].as_posix() for entry, where in entries]
        return self._by_name(names, self.layout.images, members, origin)


class AircraftPictures(Placement):
    """FGVC-Aircraft, whose lists come with its pictures."""

    texts = ("variants.txt", "images_variant_train.txt", "images_variant_val.txt", "images_variant_test.txt")

    def place(self, members: Iterable[str], texts: Mapping[str, Text]) -> dict[str, str]:
        lines = [line for name in self.texts[1:] for line in texts[name].content.decode("utf-8", "replace").splitlines()]
        names = [f"{line.split()[0]}.jpg" for line in lines if line.strip()]
        return self._by_name(names, "images", members, texts[self.texts[1]].origin)


class ImageNetPictures(Placement):
    """ImageNet-1k: training pictures lie in `<wnid>/` or `<wnid>.tar`, validation pictures are sorted by the devkit's ground truth."""

    texts = ("ILSVRC2012_validation_ground_truth.txt", "meta.mat")
    keeps_texts = False

    def place(self, members: Iterable[str], texts: Mapping[str, Text]) -> dict[str, str]:
        truth = self._truth(texts)
        found: dict[str, list[str]] = defaultdict(list)
        for member in members:
            folder, _, name = member.rpartition("/")
            wnid = folder.rpartition("/")[2].removesuffix(".tar")
            if number := re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name):
                if not 0 < int(number[1]) <= len(truth):
                    raise UserError(f"{member}: the ground truth {texts[self.texts[0]].origin} has {len(truth)} lines")
                found[f"val/{truth[int(number[1]) - 1]}/{name}"].append(member)
            elif re.fullmatch(r"n\d{8}", wnid) and PurePosixPath(name).suffix.lower() in SUFFIXES:
                found[f"train/{wnid}/{name}"].append(member)
        for split in ("train", "val"):
            if not any(place.startswith(split) for place in found):
                raise UserError(f"imagenet: no {split} picture is in the archives given; this set comes as {self.archives}")
        return _one_each(found)

    def _truth(self, texts: Mapping[str, Text]) -> list[str]:
        """The wnid of each validation picture, by number."""
        from scipy.io import loadmat  # not needed for the other sets

        truth, meta = (texts[name] for name in self.texts)
        try:
            synsets = loadmat(io.BytesIO(meta.content), squeeze_me=True)["synsets"]
            wnids = {int(number): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"])}
        except (ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
            raise UserError(f"{meta.origin}: not the devkit's meta.mat ({type(error).__name__}: {error})") from error
        lines = truth.content.decode("ascii", "replace").split()
        for number, line in enumerate(lines, start=1):
            if not line.isdecimal() or int(line) not in wnids:
                raise UserError(f"{truth.origin}, line {number}: {line!r} is no class of {meta.origin}")
        return [wnids[int(line)] for line in lines]


def _one_each(found: Mapping[str, list[str]]) -> dict[str, str]:
    """The first member of every place; says so where there are several."""
    several = [place for place, candidates in found.items() if len(set(candidates)) > 1]
    if several:
        first, other = list(dict.fromkeys(found[several[0]]))[:2]
        warnings.warn(f"{len(several)} pictures are more than once in the archives; taking {first}, not {other}, and so on", stacklevel=3)
    return {place: candidates[0] for place, candidates in found.items()}
