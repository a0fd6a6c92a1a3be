"""The data module of image classification: k pictures a class for training, a whole split for testing."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from torch.utils.data import DataLoader

from vision_peft.backbones.base import Preprocess
from vision_peft.data.dataset import ImageDataset, PathDataset
from vision_peft.data.fewshot import few_shot
from vision_peft.data.images import list_images
from vision_peft.data.loader import ResumableLoader
from vision_peft.data.picture_data import PictureData
from vision_peft.data.records import ImageSplits, Record, absent_classes
from vision_peft.data.roots import existing
from vision_peft.data.sampler import OrderedSampler
from vision_peft.data.source import Source
from vision_peft.data.transforms import EvalTransform, train_transform
from vision_peft.data.verify import verify
from vision_peft.errors import UserError


class FewShotImages(PictureData):
    """Labelled pictures of a Source. Batches are (images float32 (B, 3, S, S), labels int64 (B,)).

    The task sets `preprocess` (its backbone's) before a loader is asked for. Last partial batches are kept. Which pictures are drawn,
    their order and augmentation depend on `seed` (and the epoch), never on workers, devices or an interruption. A set without val:
    with shots, val is drawn from train beside the shots; without, there is no validation. A set without test: testing is an error.

    Args:
        source: where pictures and labels come from.
        shots: training pictures a class; null takes the whole train split.
        seed: of the few-shot draw, the order and the augmentation; published runs use 1, 2, 3.
        batch_size: training pictures a device and step.
        eval_batch_size: pictures a device and step in validation, test and prediction.
        num_workers: processes that decode and augment; 0 does it in the training process, which is enough with cached pictures.
        augment: "clip_lora" random crop and flip; "flip" evaluation crop and flip; "none" evaluation transform, so features can be kept.
        min_scale: smallest area of a random crop, as a share of the picture.
        views: augmented versions of a picture, one an epoch in turn, so that features can be kept; null: a new one every epoch.
        shrink: before random crops, pictures are shrunk to a short side of at most shrink times the input size; null crops the
            original, as the CLIP-LoRA paper does, at several times the memory.
        bad_images: on pictures that do not decode, found before training: "error" or "skip" (warns; leaves fewer than `shots`).
        cache_images: keep train and val pictures decoded in memory, as uint8: 150 kB each at 224 pixels, 450 kB with "clip_lora".
            Changes no pixel. Test pictures are read once and not kept.
        full_val: validate on the whole val split instead of the min(shots, 4) pictures a class drawn for it.
        template: prompt with {} where the class name goes.
        predict_folder: the pictures to predict, at any depth, in sorted order.

    Attributes:
        preprocess: how pictures become the network's input; None until the task sets it.
        with_index: False; set to True, train, val and test batches end in the indices int64 (B,) of their items in `train_records`, ...
        class_names, num_classes: what labels mean, after setup().
        train_records, val_records, test_records: after the setup() of a stage that uses them; empty before.
    """

    def __init__(
        self,
        source: Source,
        shots: int | None = 16,
        seed: int = 1,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        augment: Literal["clip_lora", "flip", "none"] = "clip_lora",
        min_scale: float = 0.08,
        views: int | None = None,
        shrink: float | None = 1.5,
        bad_images: Literal["error", "skip"] = "error",
        cache_images: bool = True,
        full_val: bool = False,
        template: str = "a photo of a {}.",
        predict_folder: str | None = None,
    ) -> None:
        super().__init__()
        for key, value in {"shots": shots, "batch_size": batch_size, "eval_batch_size": eval_batch_size, "views": views}.items():
            if value is not None and value < 1:
                raise UserError(f"data.{key}: must be at least 1, not {value}")
        if not 0 < min_scale <= 1:
            raise UserError(f"data.min_scale: must be above 0 and at most 1, not {min_scale}")
        if shrink is not None and shrink < 1:
            raise UserError(f"data.shrink: must be at least 1 or null, not {shrink}")
        if template.count("{}") != 1:
            raise UserError(f"data.template: must contain {{}} once, for the class name: {template!r}")
        self.source, self.shots, self.seed = source, shots, seed
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.augment, self.min_scale, self.views, self.shrink = augment, min_scale, views, shrink
        self.bad_images, self.cache_images, self.full_val, self.template = bad_images, cache_images, full_val, template
        self.predict_folder = existing(predict_folder, "data.predict_folder") if predict_folder is not None else None
        self.preprocess: Preprocess | None = None
        self.with_index = False
        self.train_records: list[Record] = []
        self.val_records: list[Record] = []
        self.test_records: list[Record] = []
        self.predict_records: list[Record] = []

    @cached_property
    def splits(self) -> ImageSplits:
        """The whole set, as its source gives it."""
        return self.source.read()

    @property
    def class_names(self) -> list[str]:
        return self.splits.class_names

    @property
    def num_classes(self) -> int:
        return len(self.splits.class_names)

    def prompts(self) -> list[str]:
        """One sentence a class, by label."""
        return [self.template.replace("{}", name.replace("_", " ")) for name in self.class_names]

    def prepare_data(self) -> None:
        """Decode what the run will use. Lightning calls this in one process a machine first, so that the others find it verified."""
        self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str | None = None) -> None:
        """List, draw and verify the pictures of a stage: "fit", "validate", "test", "predict", or None for all.

        Raises:
            UserError: for anything wrong with the source or, unless they are skipped, with a picture.
        """
        if stage in ("fit", "validate", None):
            train, val = few_shot(self.splits, self.shots, self.seed)
            if self.full_val and self.splits.val:
                val = self.splits.val
            self.val_records = verify(val, self.bad_images)
            if stage != "validate":
                self.train_records = verify(train, self.bad_images)
                if empty := absent_classes(self.train_records, self.class_names):
                    raise UserError(f"data.bad_images: class {empty[0]!r} has no readable training picture left")
        if stage in ("test", None):
            self.test_records = verify(self.splits.test, self.bad_images)
        if stage in ("predict", None) and self.predict_folder is not None:
            self.predict_records = verify([Record(path, -1) for path in list_images(self.predict_folder)], self.bad_images)

    def train_dataloader(self) -> ResumableLoader:
        return self._training_loader(self.train_dataset)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Without val pictures an empty list, at which Lightning leaves validation out."""
        return self._eval_loader(self.val_dataset) if self.val_records else []

    def test_dataloader(self) -> DataLoader:
        if not self.test_records:
            raise UserError(f"data.source: {type(self.source).__name__} has no test pictures")
        return self._eval_loader(self.test_dataset)

    def predict_dataloader(self) -> DataLoader:
        """Batches (images, paths: list of B strings), in sorted order."""
        if not self.predict_records:
            raise UserError(f"data.predict_folder: {'not set' if self.predict_folder is None else f'no picture in {self.predict_folder}'}")
        dataset = PathDataset(self.predict_records, EvalTransform(self._preprocess()))
        return DataLoader(dataset, batch_size=self.eval_batch_size, **self._loading())

    @cached_property
    def train_dataset(self) -> ImageDataset:
        """`train_dataset.views` tells whether its items repeat, so that what is computed from them can be kept."""
        self._require_setup(self.train_records, "fit")
        transform = train_transform(self.augment, self._preprocess(), self.min_scale, self.shrink)
        options = {"seed": self.seed, "cache": self.cache_images, "with_index": self.with_index, "views": self.views}
        return ImageDataset(self.train_records, transform, **options)

    def plain_train_dataset(self) -> ImageDataset:
        """The training pictures under the evaluation transform."""
        self._require_setup(self.train_records, "fit")
        return ImageDataset(self.train_records, EvalTransform(self._preprocess()), with_index=False)

    @cached_property
    def val_dataset(self) -> ImageDataset:
        self._require_setup(self.val_records, "fit")
        return ImageDataset(self.val_records, EvalTransform(self._preprocess()), cache=self.cache_images, with_index=self.with_index)

    @cached_property
    def test_dataset(self) -> ImageDataset:
        self._require_setup(self.test_records, "test")
        return ImageDataset(self.test_records, EvalTransform(self._preprocess()), with_index=self.with_index)

    @staticmethod
    def _require_setup(records: list[Record], stage: str) -> None:
        if not records:  # a dataset is built once: one of no pictures would stay
            raise RuntimeError(f"no pictures: call setup({stage!r}) first, or the set has no such split")

    def _eval_loader(self, dataset: ImageDataset) -> DataLoader:
        return DataLoader(dataset, batch_size=self.eval_batch_size, sampler=OrderedSampler(dataset, *self._place()), **self._loading())

    def _preprocess(self) -> Preprocess:
        if self.preprocess is None:
            raise UserError("data: preprocess is not set; the task must do `datamodule.preprocess = backbone.preprocess` before loaders")
        return self.preprocess
