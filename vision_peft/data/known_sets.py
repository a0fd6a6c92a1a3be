"""The eleven few-shot sets: where they are kept, what they come as, how many pictures they should have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vision_peft.data.coop_split import LAYOUTS, CoopSplit
from vision_peft.data.fgvc_aircraft import FgvcAircraft
from vision_peft.data.imagenet import ImageNet
from vision_peft.data.placement import AircraftPictures, CoopPictures, ImageNetPictures, Placement
from vision_peft.data.source import Source
from vision_peft.errors import UserError, nearest


class Counts(NamedTuple):
    """Classes, and pictures a split; 0 for a split that a set does not have."""

    classes: int
    train: int
    val: int
    test: int

    def __str__(self) -> str:
        return f"{self.classes} classes, train {self.train}, val {self.val or 'none'}, test {self.test}"


@dataclass(frozen=True)
class KnownSet:
    """One set.

    Attributes:
        name: on the command line and, where it is one of CoOp's nine, in YAML.
        folders: the spellings of its folder, in the order in which its source looks for them; a new set gets the first.
        counts: quoted from memory of CoOp's paper, not counted in the archives.
        placement: which file of its archives goes where.
        source: its reader, given the folder.
    """

    name: str
    folders: tuple[str, ...]
    counts: Counts
    placement: Placement
    source: Callable[[str], Source]

    def folder(self, root: Path) -> Path:
        """Where the set is in `root`, or will be."""
        places = [root / name for name in self.folders]
        return next((place for place in places if place.exists()), places[0])

    def count(self, folder: Path) -> Counts:
        """What is in `folder`, read by the set's own source."""
        splits = self.source(str(folder)).read()
        return Counts(len(splits.class_names), len(splits.train), len(splits.val), len(splits.test))


def _coop(name: str, counts: Counts, archives: str) -> KnownSet:
    return KnownSet(name, LAYOUTS[name].folders, counts, CoopPictures(name, archives), lambda folder: CoopSplit(name, folder))


CARS = "cars_train.tgz and cars_test.tgz (car_ims.tgz numbers its pictures in another order)"
AIRCRAFT = "fgvc-aircraft-2013b.tar.gz"
ILSVRC = "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz"
_SETS = [
    _coop("caltech101", Counts(100, 4128, 1649, 2465), "caltech-101.zip, or 101_ObjectCategories.tar.gz out of it"),
    _coop("oxford_pets", Counts(37, 2944, 736, 3669), "images.tar.gz"),
    _coop("stanford_cars", Counts(196, 6509, 1635, 8041), CARS),
    _coop("oxford_flowers", Counts(102, 4093, 1633, 2463), "102flowers.tgz"),
    _coop("food101", Counts(101, 50500, 20200, 30300), "food-101.tar.gz"),
    KnownSet("fgvc_aircraft", ("fgvc_aircraft", "FGVCAircraft"), Counts(100, 3334, 3333, 3333), AircraftPictures(AIRCRAFT), FgvcAircraft),
    _coop("sun397", Counts(397, 15880, 3970, 19850), "SUN397.tar.gz"),
    _coop("dtd", Counts(47, 2820, 1128, 1692), "dtd-r1.0.1.tar.gz"),
    _coop("eurosat", Counts(10, 13500, 5400, 8100), "EuroSAT.zip"),
    _coop("ucf101", Counts(101, 7639, 1898, 3783), "UCF-101-midframes.zip"),
    KnownSet("imagenet", ("imagenet", "ImageNet"), Counts(1000, 1281167, 0, 50000), ImageNetPictures(ILSVRC), ImageNet),
]
KNOWN_SETS = {known.name: known for known in _SETS}


def known_set(name: str) -> KnownSet:
    if name not in KNOWN_SETS:
        raise UserError(f"unknown set {name!r}; there are {', '.join(KNOWN_SETS)}{nearest(name, KNOWN_SETS)}")
    return KNOWN_SETS[name]
