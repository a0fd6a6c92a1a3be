"""The eight sets of pictures with opinion scores: what they come as, how many pictures they should have, how these are counted."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from vision_peft.data.known_set import Counts, KnownSet
from vision_peft.data.opinion_placement import (
    ClivePictures,
    CsiqPictures,
    FlivePictures,
    LivePictures,
    OpinionPictures,
    TablePictures,
    TidPictures,
)
from vision_peft.errors import UserError


@dataclass(frozen=True)
class KnownOpinions(KnownSet):
    """A set of pictures with opinion scores, whose split.csv is written when it is prepared."""

    source: None = None
    recalled_from: str = "the set's own description"

    def count(self, folder: Path) -> Counts:
        """Pictures that split.csv lists and that are there; those without a split are counted with train.

        Raises:
            UserError: no split.csv, or it names a picture that is not there.
        """
        path = folder / "split.csv"
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        for row in rows:
            if not (folder / (row.get("path") or "-")).is_file():
                raise UserError(f"{path}: names {row.get('path')!r}, which does not exist")
        found = Counter(row.get("split") or "train" for row in rows)
        return Counts(0, found["train"], found["val"], found["test"])


def _scored(name: str, train: int, placement: OpinionPictures, val: int = 0, test: int = 0) -> KnownOpinions:
    """All pictures of a set without an official split are in `train`."""
    return KnownOpinions(name, (name,), Counts(0, train, val, test), placement)


KONIQ = "koniq10k_1024x768.zip and koniq10k_scores_and_distributions.zip"
KONIQ_COLUMNS = {"picture": "image_name", "mos": "MOS_zscore"}
FLIVE = "an archive of the folder database/ that PaQ-2-PiQ's database_prep.ipynb makes, and its three lists"
SPAQ = "an archive of TestImage/, and 'MOS and Image attribute scores.xlsx'"
SPAQ_COLUMNS = {"picture": "Image name", "mos": "MOS"}
KADID_COLUMNS = {"picture": "dist_img", "mos": "dmos", "std": "var", "reference": "ref_img"}
OPINION_SETS = [
    _scored("koniq10k", 10073, TablePictures(KONIQ, "koniq10k_scores_and_distributions.csv", KONIQ_COLUMNS, "1024x768/")),
    _scored("clive", 1162, ClivePictures("ChallengeDB_release.zip")),
    _scored("flive", 30253, FlivePictures(FLIVE), val=7727, test=1827),
    _scored("spaq", 11125, TablePictures(SPAQ, "MOS and Image attribute scores.xlsx", SPAQ_COLUMNS)),
    _scored("live", 779, LivePictures("databaserelease2.zip (packed anew if it has a password), and dmos_realigned.mat")),
    _scored("csiq", 866, CsiqPictures("dst_imgs.zip and csiq.DMOS.xlsx")),
    _scored("tid2013", 3000, TidPictures("tid2013.rar, which must be packed anew as a .zip or .tar")),
    _scored("kadid10k", 10125, TablePictures("kadid10k.zip", "dmos.csv", KADID_COLUMNS)),
]
