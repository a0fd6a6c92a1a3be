"""The data module: what it draws, batches, workers, views, prediction; what it says when something is wrong."""

from __future__ import annotations

import random

import lightning
import pytest
import torch
from jsonargparse import ArgumentParser

from vision_peft.data import CsvSource, ImageFolder
from vision_peft.data.fewshot_images import FewShotImages
from vision_peft.errors import UserError


def _epoch(data: FewShotImages, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def _same(left, right) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for one, other in zip(left, right) for a, b in zip(one, other))


def test_batches(digits):
    batches = _epoch(digits(), 0)
    assert [images.shape for images, _ in batches] == [(6, 3, 16, 16)] * 3 + [(2, 3, 16, 16)]
    assert batches[0][0].dtype == torch.float32 and batches[0][1].dtype == torch.int64
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [2] * 10


def test_pixels_do_not_depend_on_workers_cache_or_global_state(digits):
    plain = _epoch(digits(), 1)
    torch.rand(1), random.random()
    assert _same(_epoch(digits(num_workers=2), 1), plain)
    assert _same(_epoch(digits(cache_images=False), 1), plain)
    assert not _same(_epoch(digits(seed=2), 1), plain)


def test_loading_leaves_the_global_stream_alone(digits):
    before = torch.get_rng_state()
    _epoch(digits(), 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("augment", "views", "period"),
    [("clip_lora", None, None), ("flip", None, None), ("flip", 2, 2), ("clip_lora", 3, 3), ("none", None, 1)],
)
def test_pictures_repeat_after_as_many_epochs_as_there_are_views(digits, augment, views, period):
    data = digits(augment=augment, views=views)
    data.setup("fit")
    epochs = [[(data.train_dataset.at(index, epoch),) for index in range(20)] for epoch in range(4)]
    repeats = [later for later in (1, 2, 3) if _same(epochs[0], epochs[later])]
    assert repeats == ([] if period is None else list(range(period, 4, period)))
    assert data.train_dataset.views == period


def test_identity_changes_with_all_that_pixels_depend_on(csv_set, preprocess):
    def identity(**arguments) -> str:
        data = FewShotImages(CsvSource(str(csv_set)), **{"shots": 2, "views": 2, **arguments})
        data.preprocess = preprocess
        data.setup("fit")
        return data.train_dataset.identity()

    assert identity() == identity(cache_images=False)
    changes = [{"seed": 3}, {"shots": 1}, {"views": 3}, {"augment": "flip"}, {"min_scale": 0.5}, {"shrink": 1.0}]
    assert len({identity(), *(identity(**change) for change in changes)}) == 7


def test_index_points_into_the_records(digits):
    data = digits(augment="none")
    data.with_index = True
    for images, labels, indices in _epoch(data, 0):
        assert [data.train_records[index].label for index in indices] == labels.tolist()
        assert torch.equal(images[0], data.train_dataset[int(indices[0])][0])


def test_val_is_the_drawn_subset_or_the_whole_and_test_the_whole(digits):
    data = digits()
    data.setup()
    assert len(data.val_records) == 20 and len(data.test_records) == len(data.splits.test)
    whole = digits(full_val=True)
    whole.setup("validate")
    assert whole.val_records == whole.splits.val and not whole.train_records
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 20


def test_prompts(csv_set):
    data = FewShotImages(CsvSource(str(csv_set)), template="a {} in the wild")
    assert data.prompts() == ["a cat in the wild", "a red fox in the wild"] and data.num_classes == 2


def test_sets_without_val_or_test(tmp_path, picture, preprocess):
    for number in range(4):
        picture(tmp_path / "train" / "a" / f"{number}.png", number)
        picture(tmp_path / "train" / "b" / f"{number}.png", number)
    data = FewShotImages(ImageFolder(str(tmp_path)), shots=2)
    data.preprocess = preprocess
    data.setup()
    assert len(data.train_records) == len(data.val_records) == 4 and not set(data.train_records) & set(data.val_records)
    with pytest.raises(UserError, match="ImageFolder has no test pictures"):
        data.test_dataloader()
    everything = FewShotImages(ImageFolder(str(tmp_path)), shots=None)
    everything.setup("fit")
    assert len(everything.train_records) == 8 and everything.val_dataloader() == []


def test_bad_pictures_are_found_before_training(csv_set, preprocess):
    victims = [csv_set.parent / f"images/cat/{number}.png" for number in (7, 8)]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:200])
    with pytest.raises(UserError, match=r"7\.png: .*2 bad pictures among"):
        FewShotImages(CsvSource(str(csv_set)), shots=None).setup("fit")
    data = FewShotImages(CsvSource(str(csv_set)), shots=None, bad_images="skip")
    with pytest.warns(UserWarning, match=r"8\.png"):
        data.setup("fit")
    assert [record.path.name for record in data.train_records] == ["1.png", "2.png", "3.png", "9.png"]
    last = csv_set.parent / "images/cat/9.png"
    last.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="class 'cat' has no readable training picture left"):
        data.setup("fit")


def test_what_is_wrong_is_said(digits, tmp_path):
    data = digits()
    data.preprocess = None
    data.setup("fit")
    with pytest.raises(UserError, match="preprocess is not set"):
        data.train_dataloader()
    with pytest.raises(RuntimeError, match="call setup"):
        digits().train_dataloader()
    with pytest.raises(UserError, match=r"data\.predict_folder: not set"):
        data.predict_dataloader()
    wrong = {"shots": 0, "min_scale": 0.0, "template": "a photo", "shrink": 0.5, "predict_folder": str(tmp_path / "no")}
    for key, value in wrong.items():
        with pytest.raises(UserError, match=rf"data\.{key}"):
            digits(**{key: value})


def test_a_cache_too_large_is_refused(digits, monkeypatch):
    monkeypatch.setattr("vision_peft.data.dataset.CACHE_LIMIT", 1000)
    data = digits()
    data.setup("fit")
    with pytest.raises(UserError, match=r"data\.cache_images"):
        data.train_dataloader()


def test_yaml(csv_set):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FewShotImages, "data")
    source = f"{{class_path: vision_peft.data.CsvSource, init_args: {{file: {csv_set}}}}}"
    text = f"{{class_path: {FewShotImages.__module__}.FewShotImages, init_args: {{source: {source}, shots: null, augment: flip}}}}"
    data = parser.instantiate(parser.parse_args(["--data", text])).data
    assert data.shots is None and data.augment == "flip" and data.source.file == csv_set


class Predictor(lightning.LightningModule):
    def predict_step(self, batch, batch_idx):
        images, paths = batch
        assert images.shape == (len(paths), 3, 16, 16)
        return paths


def test_prediction_yields_every_picture_with_its_path_in_order(digits, tmp_path, picture):
    paths = [picture(tmp_path / "new" / name, number) for number, name in enumerate(("b.png", "a.jpg", "sub/c.png"))]
    (tmp_path / "new" / "notes.txt").write_text("x")
    data = digits(predict_folder=str(tmp_path / "new"), eval_batch_size=2)
    trainer = lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    batches = trainer.predict(Predictor(), data)
    assert [path for batch in batches for path in batch] == sorted(map(str, paths))


def test_real_textures(real_set, preprocess):
    data = FewShotImages(CsvSource(str(real_set("dtd10") / "split.csv")), shots=1, batch_size=4)
    data.preprocess = preprocess
    batches = _epoch(data, 0)
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert data.prompts()[0] == "a photo of a banded."
