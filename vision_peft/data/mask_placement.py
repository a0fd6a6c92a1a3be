"""Which file of a segmentation set's public archives becomes a picture, a mask or a field of view; the split file is written here."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw

from vision_peft.data.placement import Placement, Text
from vision_peft.errors import UserError


@dataclass(frozen=True)
class Part:
    """Files that belong together: regular expressions on the ends of paths; `ID1`, `ID2` stand for what the picture's groups captured.

    Attributes:
        split: of all its pictures; None: the first `train` in order of their numbers are for training, the others for the test.
    """

    split: str | None
    image: str
    mask: str
    fov: str | None = None
    train: int = 0


class MaskPictures(Placement):
    """Pictures in images/, masks in masks/, fields of view in fov/, and split.csv."""

    texts = ()

    def __init__(self, archives: str, *parts: Part) -> None:
        super().__init__(archives)
        self.parts = parts

    def place(self, members: Iterable[str], texts: Mapping[str, Text]) -> dict[str, str]:
        members = list(members)
        placed: dict[str, str] = {}
        for part in self.parts:
            pattern = re.compile(f"(?:.*/)?{part.image}", re.IGNORECASE)
            found = {match.groups(): member for member in members if (match := pattern.fullmatch(member))}
            if not found:
                raise UserError(f"no file in the archives ends in {_readable(part.image)}: the set comes as {self.archives}")
            for groups, member in sorted(found.items(), key=lambda item: _order("_".join(item[0]))):
                name = "_".join((*([part.split] if part.split else []), *groups))
                placed[f"images/{name}{_suffix(member)}"] = member
                for role, rule in (("masks", part.mask), ("fov", part.fov)):
                    if rule is not None:
                        for place, group in enumerate(groups, start=1):
                            rule = rule.replace(f"ID{place}", re.escape(group))
                        partner = self._partner(members, rule, member, role)
                        placed[f"{role}/{name}{_suffix(partner)}"] = partner
        return placed

    @staticmethod
    def _partner(members: list[str], rule: str, image: str, role: str) -> str:
        pattern = re.compile(f"(?:.*/)?{rule}", re.IGNORECASE)
        for member in members:
            if pattern.fullmatch(member):
                return member
        raise UserError(f"{image}: there is no {_readable(rule)} for its {role} in the archives")

    def finish(self, folder: Path) -> None:
        """Unpack what is compressed one by one, then write split.csv from the files that are there."""
        for packed in list(folder.rglob("*.gz")):
            with gzip.open(packed) as source, packed.with_suffix("").open("wb") as target:
                shutil.copyfileobj(source, target)
            packed.unlink()
        rows = []
        files = {role: {path.stem: path for path in (folder / role).glob("*")} for role in ("images", "masks", "fov")}
        for part in self.parts:
            own = sorted((stem for stem in files["images"] if self._belongs(stem, part)), key=_order)
            for place, stem in enumerate(own):
                split = part.split or ("train" if place < part.train else "test")
                paths = [files[role][stem].relative_to(folder).as_posix() if stem in files[role] else "" for role in files]
                rows.append([*paths, split])
        _write_split(folder, rows)

    def _belongs(self, stem: str, part: Part) -> bool:
        return len(self.parts) == 1 or stem.startswith(f"{part.split}_")


class ArcadePictures(Placement):
    """ARCADE's vessel (syntax) part: COCO polygons of any category become one binary mask."""

    texts = ()

    def place(self, members: Iterable[str], texts: Mapping[str, Text]) -> dict[str, str]:
        placed = {}
        for member in members:
            match = re.fullmatch(r"(?:.*/)?syntax/(train|val|test)/(images/(\d+)\.png|annotations/\w+\.json)", member)
            if match:
                split, number = match[1], match[3]
                placed[f"images/{split}_{number}.png" if number else f"{split}.json"] = member
        if not {"train.json", "val.json", "test.json"} <= placed.keys():
            raise UserError(f"no syntax/{{train,val,test}}/annotations/*.json in the archives: the set comes as {self.archives}")
        return placed

    def finish(self, folder: Path) -> None:
        rows = []
        (folder / "masks").mkdir()
        for split in ("train", "val", "test"):
            path = folder / f"{split}.json"
            try:
                found = json.loads(path.read_text())
                pictures = {each["id"]: each for each in found["images"]}
                polygons: dict[int, list[list[float]]] = {number: [] for number in pictures}
                for each in found["annotations"]:
                    polygons[each["image_id"]] += each["segmentation"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path.name}: not COCO annotations ({type(error).__name__}: {error})") from error
            for number, picture in sorted(pictures.items()):
                name = f"{split}_{PurePosixPath(picture['file_name']).stem}.png"
                mask = Image.new("L", (picture["width"], picture["height"]))
                for polygon in polygons[number]:
                    ImageDraw.Draw(mask).polygon([*zip(polygon[::2], polygon[1::2])], fill=255)
                mask.save(folder / "masks" / name)
                rows.append([f"images/{name}", f"masks/{name}", "", split])
            path.unlink()
        _write_split(folder, rows)


class SequencePictures(MaskPictures):
    """DIAS: the frames of a sequence share one mask; the picture is the darkest they are at each pixel, where contrast ever passed."""

    def place(self, members: Iterable[str], texts: Mapping[str, Text]) -> dict[str, str]:
        placed, members = {}, list(members)
        for part in self.parts:
            for rule, role in ((part.image, "frames"), (part.mask, "masks")):
                pattern = re.compile(f"(?:.*/)?{rule}", re.IGNORECASE)
                for member in members:
                    if match := pattern.fullmatch(member):
                        placed[f"{role}/{part.split}_{'_'.join(match.groups())}{_suffix(member)}"] = member
        if not placed:
            raise UserError(f"no file in the archives ends in {_readable(self.parts[0].image)}: the set comes as {self.archives}")
        return placed

    def finish(self, folder: Path) -> None:
        (folder / "images").mkdir()
        for mask in sorted((folder / "masks").glob("*")):
            frames = sorted((folder / "frames").glob(f"{mask.stem}_*"))
            if not frames:
                raise UserError(f"masks/{mask.name}: there are no frames of its sequence in the archives")
            darkest = np.min([np.asarray(Image.open(frame).convert("L")) for frame in frames], axis=0)
            Image.fromarray(darkest).save(folder / "images" / f"{mask.stem}.png")
        shutil.rmtree(folder / "frames")
        super().finish(folder)


def _suffix(member: str) -> str:
    name = member.rpartition("/")[2].lower()
    return "".join(PurePosixPath(name).suffixes[-2:]) if name.endswith(".gz") else PurePosixPath(name).suffix


def _order(text: str) -> list[tuple[int, int, str]]:
    """Numbers by value."""
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.findall(r"\d+|\D+", text)]


def _readable(rule: str) -> str:
    return re.sub(r"\(?\\[dw]\+\)?", "N", rule).replace("\\.", ".")


def _write_split(folder: Path, rows: list[list[str]]) -> None:
    with (folder / "split.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mask", "fov", "split"])
        writer.writerows(rows)
