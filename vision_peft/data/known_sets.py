"""The known sets, of few-shot classification, vessels and image quality: where they are, what they come as, how many they should have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vision_peft.data.coop_split import LAYOUTS, CoopSplit
from vision_peft.data.fgvc_aircraft import FgvcAircraft
from vision_peft.data.imagenet import ImageNet
from vision_peft.data.known_opinions import OPINION_SETS
from vision_peft.data.known_set import Counts, KnownSet
from vision_peft.data.mask_placement import ArcadePictures, MaskPictures, Part, SequencePictures
from vision_peft.data.mask_records import read_mask_csv
from vision_peft.data.placement import AircraftPictures, CoopPictures, ImageNetPictures, Placement
from vision_peft.errors import UserError, nearest


def _coop(name: str, counts: Counts, archives: str) -> KnownSet:
    return KnownSet(name, LAYOUTS[name].folders, counts, CoopPictures(name, archives), lambda folder: CoopSplit(name, folder))


@dataclass(frozen=True)
class KnownMasks(KnownSet):
    """A segmentation set, whose split.csv is written when it is prepared."""

    source: None = None
    recalled_from: str = "the set's own description"

    def count(self, folder: Path) -> Counts:
        names = {role: role for role in ("image", "mask", "fov", "slice", "split")}
        splits = read_mask_csv(str((folder / "split.csv").absolute()), names, "split.csv")
        return Counts(1, *(len(splits[split]) for split in ("train", "val", "test")))


def _masks(name: str, counts: tuple[int, int, int], placement: Placement) -> KnownMasks:
    return KnownMasks(name, (name,), Counts(1, *counts), placement)


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
_VESSELS = [
    _masks(
        "drive",
        (20, 0, 20),
        MaskPictures(
            "DRIVE.zip, or training.zip and test.zip with test/1st_manual",
            Part("train", r"training/images/(\d+)_training\.tif", r"training/1st_manual/ID1_manual1\.gif", r"training/mask/ID1_\w+\.gif"),
            Part("test", r"test/images/(\d+)_test\.tif", r"test/1st_manual/ID1_manual1\.gif", r"test/mask/ID1_\w+\.gif"),
        ),
    ),
    _masks(
        "stare",
        (16, 0, 4),
        MaskPictures("stare-images.tar and labels-ah.tar", Part(None, r"(im\d+)\.ppm(?:\.gz)?", r"ID1\.ah\.ppm(?:\.gz)?", train=16)),
    ),
    _masks("chase_db1", (20, 0, 8), MaskPictures("CHASEDB1.zip", Part(None, r"Image_(\d+[LR])\.jpg", r"Image_ID1_1stHO\.png", train=20))),
    _masks(
        "rose",
        (90, 0, 27),
        MaskPictures(
            "ROSE.zip (its part ROSE-1)",
            *(
                Part(split, rf"ROSE-1/(\w+)/{split}/img/(\d+)\.(?:tif|png)", rf"ROSE-1/ID1/{split}/gt/ID2\.(?:tif|png)")
                for split in ("train", "test")
            ),
        ),
    ),
    _masks("arcade", (1000, 200, 300), ArcadePictures("arcade.zip (its part syntax)")),
    _masks(
        "dias",
        (30, 10, 20),
        SequencePictures(
            "DIAS.zip",
            *(
                Part(split, rf"{folder}/images/image_(s\d+)_(i\d+)\.png", rf"{folder}/labels/label_(s\d+)\.png")
                for split, folder in (("train", "training"), ("val", "validation"), ("test", "test"))
            ),
        ),
    ),
    _masks("xray_angio", (100, 0, 34), MaskPictures("Database_134_Angiograms.zip", Part(None, r"(\d+)\.pgm", r"ID1_gt\.pgm", train=100))),
]
KNOWN_SETS = {known.name: known for known in [*_SETS, *_VESSELS, *OPINION_SETS]}


def known_set(name: str) -> KnownSet:
    if name not in KNOWN_SETS:
        raise UserError(f"unknown set {name!r}; there are {', '.join(KNOWN_SETS)}{nearest(name, KNOWN_SETS)}")
    return KNOWN_SETS[name]
