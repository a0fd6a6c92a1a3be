"""The data module of segmentation: pictures and their masks, whole or in patches, as a network takes them."""

from __future__ import annotations

import random
from functools import cached_property

from torch.utils.data import DataLoader

from vision_peft.backbones.base import Preprocess
from vision_peft.data.geometry import GeometryName
from vision_peft.data.images import SUFFIXES
from vision_peft.data.intensity import IntensityName
from vision_peft.data.loader import ResumableLoader
from vision_peft.data.mask_augment import AugmentName, MaskAugment
from vision_peft.data.mask_dataset import CaseDataset, Decoding, MaskDataset, Picture, Reading, read_picture
from vision_peft.data.mask_labels import MaskKind
from vision_peft.data.mask_presets import NORMALIZATIONS, PRESETS, NormalizeName, PresetName
from vision_peft.data.mask_records import MaskRecord, read_mask_csv
from vision_peft.data.parallel import map_threads
from vision_peft.data.picture_data import PictureData
from vision_peft.data.pixels import DICOM, NIFTI, list_slices
from vision_peft.data.roots import existing
from vision_peft.data.sampler import OrderedSampler
from vision_peft.errors import UserError

CACHE_LIMIT = 6 * 2**30  # bytes


class SegmentationImages(PictureData):
    """Pictures with masks, listed in a CSV file.

    Training batches are dicts of MaskDataset's items, stacked; evaluation batches are lists of Case. The task sets `preprocess` (its
    backbone's) before a loader is asked for. What is drawn depends on `seed` (and the epoch), never on workers or an interruption.

    Args:
        file: CSV with a row a picture; a relative path starts at VISION_PEFT_DATA.
        columns: names of its columns, where they differ from image, mask, fov, slice, split.
        kind: `binary`: 0 and one other number; `multiclass`: the numbers of `classes`; `instance`: 0 and the objects 1..n.
        classes: name by the number that stands for it in the masks; binary masks need none.
        one: each item asks for one class or object (for prompts); otherwise for all foreground, or for every class (semantic head).
        preset: how the well-known tools bring a picture to the network: `default`, `salt`, `samed`, `medsam`, `sammed2d`.
        geometry, intensity, normalize, augment: override the preset's; see Frame, to_unit, NORMALIZATIONS and MaskAugment.
        window: (centre, width) in the scanner's units, for intensity `window`.
        patch: side in the picture's own pixels of random pieces that the network is trained on, each resized to its input; whole
            pictures are then evaluated by a sliding window. For thin structures in large pictures.
        overlap: of neighbouring windows in evaluation, in [0, 1).
        train_images: number of training pictures, drawn by `seed`; null: all.
        val_share: of the training pictures, held out by `seed`, where the file has no val split.
        repeats: items a picture and epoch.
        seed: of draws, order and augmentation.
        batch_size: training items a device and step.
        eval_batch_size: pictures (or windows) that evaluation runs at once.
        num_workers: processes that prepare items.
        cache_images: keep train and val pictures decoded in memory, as float32.
        predict_folder: pictures to predict masks for, in sorted order.

    Attributes:
        preprocess: set by the task.
        class_names: of the foreground classes, in the order of their indices 1, 2, ...
    """

    def __init__(
        self,
        file: str,
        columns: dict[str, str] | None = None,
        kind: MaskKind = "binary",
        classes: dict[int, str] | None = None,
        one: bool = False,
        preset: PresetName = "default",
        geometry: GeometryName | None = None,
        intensity: IntensityName | None = None,
        normalize: NormalizeName | None = None,
        augment: AugmentName | None = None,
        window: tuple[float, float] | None = None,
        patch: int | None = None,
        overlap: float = 0.5,
        train_images: int | None = None,
        val_share: float = 0.1,
        repeats: int = 1,
        seed: int = 1,
        batch_size: int = 4,
        eval_batch_size: int = 4,
        num_workers: int = 0,
        cache_images: bool = True,
        predict_folder: str | None = None,
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "repeats": repeats, "train_images": train_images}
        for key, value in {**counts, "patch": patch}.items():
            if value is not None and value < 1:
                raise UserError(f"data.{key}: must be at least 1, not {value}")
        if not 0 <= overlap < 1:
            raise UserError(f"data.overlap: must be at least 0 and below 1, not {overlap}")
        if not 0 < val_share < 1:
            raise UserError(f"data.val_share: must be between 0 and 1, not {val_share}")
        if kind == "multiclass" and (not classes or 0 in classes):
            raise UserError("data.classes: multiclass masks need a name for every number but 0, e.g. {1: liver, 2: spleen}")
        known = {"image": "image", "mask": "mask", "fov": "fov", "slice": "slice", "split": "split"}
        for role in columns or {}:
            if role not in known:
                raise UserError(f"data.columns: unknown role {role!r}, expected {', '.join(known)}")
        self.file, self.columns, self.kind, self.classes, self.one = file, {**known, **(columns or {})}, kind, classes, one
        self.preset, chosen = preset, PRESETS[preset]
        self.geometry, self.intensity = geometry or chosen.geometry, intensity or chosen.intensity
        self.normalize, self.augment = normalize or chosen.normalize, augment or chosen.augment
        self.window = tuple(window) if window is not None else chosen.window
        self.patch, self.overlap, self.train_images, self.val_share, self.repeats = patch, overlap, train_images, val_share, repeats
        self.seed, self.batch_size, self.eval_batch_size = seed, batch_size, eval_batch_size
        self.num_workers, self.cache_images = num_workers, cache_images
        self.predict_folder = existing(predict_folder, "data.predict_folder") if predict_folder is not None else None
        self.splits = self._held_out(read_mask_csv(file, self.columns, "data.file"))
        self.preprocess: Preprocess | None = None
        self._pictures: dict[str, list[Picture] | None] = {}

    @property
    def class_names(self) -> list[str]:
        if self.kind == "multiclass" and not self.one:
            return list(self.classes.values())
        return [next(iter((self.classes or {1: "foreground"}).values()))]

    def object_names(self) -> dict[int, str]:
        """Name of what an item may ask for with `one`, by its number; objects of instance masks share one name."""
        if self.kind == "multiclass":
            return dict(enumerate(self.classes.values(), start=1))
        return {1: self.class_names[0]}

    def setup(self, stage: str | None = None) -> None:
        """Decode and check every picture and mask of a stage. UserError names the first that is wrong."""
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", ())
        for split in ("train", "val", "test") if stage is None else wanted:
            if split not in self._pictures:
                self._pictures[split] = self._decoded(split)

    def train_dataloader(self) -> ResumableLoader:
        return self._training_loader(self.train_dataset)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._cases("val") if self.splits["val"] else []

    def test_dataloader(self) -> DataLoader:
        if not self.splits["test"]:
            raise UserError(f"data.file: {self.file} has no test pictures")
        return self._cases("test")

    def predict_dataloader(self) -> DataLoader:
        if self.predict_folder is None:
            raise UserError("data.predict_folder: not set")
        if self.one:
            raise UserError("data.one: prediction has no masks to take prompts from; set it to false")
        names = (*SUFFIXES, *DICOM, *NIFTI)
        found = sorted(path for path in self.predict_folder.rglob("*") if path.is_file() and path.name.lower().endswith(tuple(names)))
        if not found:
            raise UserError(f"data.predict_folder: no picture in {self.predict_folder}")
        records = [MaskRecord(path, slice=each) for path in found for each in list_slices(path)]
        dataset = CaseDataset(records, self.reading, None, self.seed)
        return DataLoader(dataset, batch_size=self._eval_batch(), collate_fn=list, **self._loading())

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.kind, self.classes, self.intensity, self.window)

    @cached_property
    def reading(self) -> Reading:
        if self.preprocess is None:
            raise UserError("data: preprocess is not set; the task must do `datamodule.preprocess = backbone.preprocess` before loaders")
        mean, std = self.preprocess.mean, self.preprocess.std
        if self.normalize != "backbone":
            mean, std = (tuple(each / 255 for each in values) for values in NORMALIZATIONS[self.normalize])
        return Reading(self.decoding, self.geometry, self.preprocess.size, self.patch, mean, std, self.one)

    @cached_property
    def train_dataset(self) -> MaskDataset:
        if "train" not in self._pictures:
            raise RuntimeError("no pictures: call setup('fit') first")
        augment = None if self.augment == "none" else MaskAugment(self.augment)
        pictures = self._pictures["train"]
        return MaskDataset(self.splits["train"], self.reading, pictures, augment, self.seed, self.repeats)

    def _cases(self, split: str) -> DataLoader:
        dataset = CaseDataset(self.splits[split], self.reading, self._pictures[split], self.seed)
        sampler = OrderedSampler(dataset, *self._place())
        return DataLoader(dataset, batch_size=self._eval_batch(), sampler=sampler, collate_fn=list, **self._loading())

    def _eval_batch(self) -> int:
        return 1 if self.patch is not None else self.eval_batch_size

    def _decoded(self, split: str) -> list[Picture] | None:
        """Pictures in the order of the records; None where they are decoded at each use (they have been checked then)."""
        records = self.splits[split]
        if not self.cache_images or split == "test":
            map_threads(lambda record: read_picture(record, self.decoding) and None, records, f"checking {split} pictures")
            return None
        if records:
            first = read_picture(records[0], self.decoding)
            need = sum(each.numel() * each.element_size() for each in first[:3]) * len(records)
            if need > CACHE_LIMIT:
                raise UserError(f"data.cache_images: would take about {need / 2**30:.0f} GiB for {len(records)} pictures; set it to false")
        return map_threads(lambda record: read_picture(record, self.decoding), records, f"decoding {split} pictures")

    def _held_out(self, splits: dict[str, list[MaskRecord]]) -> dict[str, list[MaskRecord]]:
        """The splits with val taken out of train where the file has none, and train cut to `train_images`."""
        train = splits["train"]
        if not train:
            raise UserError(f"data.file: {self.file} has no training picture")
        if not splits["val"] and len(train) > 1:
            val = set(random.Random(f"val/{self.seed}").sample(range(len(train)), max(1, round(self.val_share * len(train)))))
            splits = {**splits, "val": [train[i] for i in sorted(val)]}
            train = [record for i, record in enumerate(train) if i not in val]
        if self.train_images is not None:
            if self.train_images > len(train):
                raise UserError(f"data.train_images: is {self.train_images}, but {self.file} has {len(train)} training pictures")
            train = random.Random(f"train/{self.seed}").sample(train, self.train_images)
        return {**splits, "train": train}
