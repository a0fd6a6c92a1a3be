"""Which file of a quality set's public archives is a picture with an opinion score, and what the score is; split.csv is written here.

The column `mos` of split.csv is in the set's own unit, and higher is better in every set: DMOS, how much worse than the reference a
picture is thought to be, is negated, so that whoever reads the file needs no list of the sets in which less is better. Reference
pictures themselves are neither listed nor kept: their DMOS is 0 by definition, and the sets with MOS do not score them.

The layouts inside are those that public code reads (IQA-PyTorch, ARNIQA, IQA-Dataset, the repositories of KonIQ-10k and PaQ-2-PiQ); no
archive was seen. How SPAQ, CSIQ, TID2013 and KADID-10k are packed is recalled. Wherever in an archive pictures lie, their names tell them.
"""

from __future__ import annotations

import csv
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vision_peft.data.opinion_labels import Rating, Value, check_lengths, read_arrays, read_lines, read_table
from vision_peft.data.placement import Placement, Text
from vision_peft.errors import UserError


class OpinionPictures(Placement):
    """Pictures in images/, under the names that the label files give them, and split.csv.

    Attributes:
        texts: label files that the set needs; missing pictures are put down to the first.
        extras: label files that are used if they are in the archives.
    """

    extras: tuple[str, ...] = ()

    @abstractmethod
    def ratings(self, texts: Mapping[str, Text]) -> list[Rating]:
        """What the label files say.

        Raises:
            UserError: names file, line and what is wrong.
        """

    def place(self, members: Iterable[str], texts: Mapping[str, Text]) -> dict[str, str]:
        members, origin = list(members), texts[self.texts[0]].origin
        names = [rating.picture for rating in self.ratings(texts)]
        if not names:
            raise UserError(f"{origin}: names no picture of the set")
        [(name, times)] = Counter(name.lower() for name in names).most_common(1)
        if times > 1:
            raise UserError(f"{origin}: names {name} {times} times")
        placed = self._by_name(_as_spelled(names, members), "images", members, origin)
        return placed | {member.rpartition("/")[2]: member for member in members if member.rpartition("/")[2] in self.extras}

    def finish(self, folder: Path) -> None:
        """Write split.csv from the label files, which are then removed: they are read, not part of the set."""
        files = [folder / name for name in (*self.texts, *self.extras) if (folder / name).is_file()]
        ratings = self.ratings({file.name: Text(str(file), file.read_bytes()) for file in files})
        pictures = {path.relative_to(folder).as_posix().lower(): path for path in (folder / "images").rglob("*")}
        optional = [name for name in ("std", "reference", "split") if any(getattr(rating, name) is not None for rating in ratings)]
        with (folder / "split.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["path", "mos", *optional])
            for rating in ratings:
                path = pictures[f"images/{rating.picture.lower()}"].relative_to(folder).as_posix()
                writer.writerow([path, rating.mos, *(getattr(rating, name) for name in optional)])
        for file in files:
            file.unlink()


class TablePictures(OpinionPictures):
    """A set whose scores stand in one table, a picture a row. KonIQ-10k, SPAQ and KADID-10k are such sets.

    KonIQ-10k: `MOS_zscore` (1..100), which published results are about; `SD` belongs to the other column, `MOS` (1..5), and is left out.
    SPAQ: 0..100; the table is the first sheet of its workbook. KADID-10k: `dmos` (1..5) is high for good pictures and `var` a standard
    deviation, whatever they are called: its first row has 4.57 and 0.496, which are mean and deviation of 17 fives and 13 fours.

    Args:
        file: the table.
        columns: its names of Rating's fields.
        folder: in which the pictures lie, where that tells them from others of the same names (KonIQ-10k also comes in half size).
    """

    def __init__(self, archives: str, file: str, columns: Mapping[str, str], folder: str = "") -> None:
        super().__init__(archives)
        self.texts, self.columns, self.folder = (file,), columns, folder

    def ratings(self, texts: Mapping[str, Text]) -> list[Rating]:
        found = []
        for row in read_table(texts[self.texts[0]], list(self.columns.values())):
            given = {field: row[name] for field, name in self.columns.items()}
            std = given["std"].number() if "std" in given else None
            reference = given["reference"].word() if "reference" in given else None
            found.append(Rating(self.folder + given["picture"].word(), given["mos"].number(), std, reference))
        return found


class FlivePictures(OpinionPictures):
    """FLIVE (PaQ-2-PiQ): whole pictures, 0..100, with the official split of two more lists; those in neither (three) are left out.

    Of the pictures of at most 640 pixels a column says which are for validation; the larger ones are the test. (The authors' file names
    lack the signs < and >.) Patches, which have scores too, are not prepared.
    """

    texts = ("labels_image.csv", "labels=640_padded.csv", "labels640.csv")

    def ratings(self, texts: Mapping[str, Text]) -> list[Rating]:
        rated, small, large = (texts[name] for name in self.texts)
        splits = {row["name_image"].text: "test" for row in read_table(large, ["name_image"])}
        for row in read_table(small, ["name_image", "is_valid"]):
            held_out = row["is_valid"].word().lower()
            if held_out not in ("true", "false"):
                raise UserError(f"{row['is_valid'].where} is {row['is_valid'].text!r}, neither True nor False")
            splits[row["name_image"].text] = "val" if held_out == "true" else "train"
        rows = [(row["name"].word(), row["mos"].number()) for row in read_table(rated, ["name", "mos"])]
        return [Rating(name, mos, split=splits[name]) for name, mos in rows if name in splits]


class ClivePictures(OpinionPictures):
    """LIVE in the Wild: 0..100. Its seven pictures t1, t2 ..., which showed observers what to do, are left out, as everybody does."""

    texts = ("AllImages_release.mat", "AllMOS_release.mat", "AllStdDev_release.mat")

    def ratings(self, texts: Mapping[str, Text]) -> list[Rating]:
        arrays = [read_arrays(texts[name], name.removesuffix(".mat"))[0] for name in self.texts]
        check_lengths({texts[name].origin: len(array) for name, array in zip(self.texts, arrays)})
        rows = [(name.word(), mos.number(), std.number()) for name, mos, std in zip(*arrays)]
        return [Rating(*row) for row in rows if not re.match(r"t\d", row[0])]


class LivePictures(OpinionPictures):
    """LIVE release 2: DMOS, about 0..100, written as its negative. Arrays run through five folders, and some entries are references.

    The authors recommend the scores that they realigned between sessions: dmos_realigned.mat is used if it is given, dmos.mat without it.
    """

    texts = ("dmos.mat", "refnames_all.mat")
    extras = ("dmos_realigned.mat",)
    counts = {"jp2k": 227, "jpeg": 233, "wn": 174, "gblur": 174, "fastfading": 174}  # of pictures img1.bmp, img2.bmp ..., in this order

    def ratings(self, texts: Mapping[str, Text]) -> list[Rating]:
        names = [f"{folder}/img{number}.bmp" for folder, count in self.counts.items() for number in range(1, count + 1)]
        [references] = read_arrays(texts["refnames_all.mat"], "refnames_all")
        scores, copies = read_arrays(texts["dmos.mat"], "dmos", "orgs")
        lengths = {"release 2": len(names), texts["refnames_all.mat"].origin: len(references), texts["dmos.mat"].origin: len(scores)}
        deviations: Sequence[Value | None] = [None] * len(names)
        if realigned := texts.get("dmos_realigned.mat"):
            scores, deviations, others = read_arrays(realigned, "dmos_new", "dmos_std", "orgs")
            lengths[realigned.origin] = len(scores)
            if [each.number() for each in others] != [each.number() for each in copies]:
                raise UserError(f"{realigned.origin}: its array orgs, of the references, is not that of dmos.mat: not of the same release")
        check_lengths(lengths)
        rows = zip(names, scores, deviations, references, copies)
        kept = [row[:-1] for row in rows if row[-1].number() == 0]
        return [Rating(name, 0 - dmos.number(), std and std.number(), reference.word()) for name, dmos, std, reference in kept]


class CsiqPictures(OpinionPictures):
    """CSIQ: DMOS, 0..1, written as its negative. The sheet all_by_image names picture, kind and level, not the file; there is no other."""

    texts = ("csiq.DMOS.xlsx",)
    kinds = {"noise": "AWGN", "blur": "BLUR", "contrast": "contrast", "fnoise": "fnoise", "jpeg": "JPEG", "jpeg 2000": "jpeg2000"}

    def ratings(self, texts: Mapping[str, Text]) -> list[Rating]:
        found = []
        for row in read_table(texts[self.texts[0]], ["image", "dst_type", "dst_lev", "dmos_std", "dmos"], "all_by_image"):
            kind = row["dst_type"].word()
            if kind not in self.kinds:
                raise UserError(f"{row['dst_type'].where} is {kind!r}, expected one of {', '.join(self.kinds)}")
            image, level = (re.sub(r"\.0+$", "", row[name].word()) for name in ("image", "dst_lev"))  # one picture is called 1600
            picture = f"{image}.{self.kinds[kind]}.{level}.png"
            found.append(Rating(picture, 0 - row["dmos"].number(), row["dmos_std"].number(), f"{image}.png"))
        return found


class TidPictures(OpinionPictures):
    """TID2013: 0..9, `score name` a line and the deviations in a file of their own; i01_06_3.bmp is made from I01.BMP."""

    texts = ("mos_with_names.txt", "mos_std.txt")

    def ratings(self, texts: Mapping[str, Text]) -> list[Rating]:
        lines, deviations = (read_lines(texts[name]) for name in self.texts)
        check_lengths({texts[name].origin: len(values) for name, values in zip(self.texts, (lines, deviations))})
        found = []
        for line, std in zip(lines, deviations):
            score, picture = (*line.text.split(None, 1), "")[:2]
            if not picture:
                raise UserError(f"{line.where}: {line.text!r} is not a score and a picture")
            reference = f"{picture.partition('_')[0].upper()}.BMP"
            found.append(Rating(picture, line._replace(text=score).number(), std.number(), reference))
        return found


def _as_spelled(names: Sequence[str], members: Sequence[str]) -> list[str]:
    """The names as the archives spell them: TID2013 and CSIQ have I and i, JPEG and jpeg for each other."""
    depths = {name.count("/") + 1 for name in names}
    tails = ("/".join(member.split("/")[-depth:]) for member in members for depth in depths)
    spelled = {tail.lower(): tail for tail in tails}
    return [spelled.get(name.lower(), name) for name in names]
