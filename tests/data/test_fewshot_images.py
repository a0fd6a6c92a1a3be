"""The data module under Lightning's own trainer: batches, workers, interruption, prediction."""

from __future__ import annotations

import random

import lightning
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from vision_peft.data import CsvSource, Digits, ImageFolder
from vision_peft.data.fewshot_images import FewShotImages
from vision_peft.data.loader import ResumableLoader
from vision_peft.data.sampler import Draw, ResumableSampler
from vision_peft.errors import UserError


@pytest.fixture
def digits(preprocess):
    """`digits(**arguments)` is a module over the digits, 2 shots, batches of 6 (20 pictures: 4 batches, the last of 2)."""

    def build(**arguments) -> FewShotImages:
        data = FewShotImages(Digits(), **{"shots": 2, "batch_size": 6, **arguments})
        data.preprocess = preprocess
        return data

    return build


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


def test_augmentation_changes_with_the_epoch_and_none_does_not(digits):
    for augment, changes in (("clip_lora", True), ("flip", True), ("none", False)):
        data = digits(augment=augment)
        data.setup("fit")
        items = [[data.train_dataset[Draw(index, epoch)] for index in range(20)] for epoch in (0, 1)]
        assert _same(*[[(image,) for image, _ in epoch] for epoch in items]) is not changes
        assert data.train_dataset.deterministic is not changes


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


class Recorder(lightning.LightningModule):
    """Keeps the batches it is trained on; learns next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch))
        return self.layer.weight.sum()

    def validation_step(self, batch, batch_idx):
        assert batch[0].shape[1:] == (3, 16, 16)

    def predict_step(self, batch, batch_idx):
        images, paths = batch
        return list(zip(paths, images.mean(dim=(1, 2, 3)).tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _trainer(path, **arguments) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return lightning.Trainer(accelerator="cpu", default_root_dir=path, num_sanity_val_steps=0, **{**quiet, **arguments})


class KillAfter(lightning.Callback):
    """Saves a checkpoint after so many steps and dies."""

    def __init__(self, step: int, file) -> None:
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 12, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize(("killed_at", "workers"), [(2, 0), (6, 0), (6, 2), (4, 0), (8, 2), (11, 0)])
def test_a_killed_run_goes_on_with_the_very_same_batches(digits, tmp_path, length, killed_at, workers):
    whole = Recorder()
    _trainer(tmp_path, **length).fit(whole, digits())
    assert len(whole.seen) == 12

    first, second = Recorder(), Recorder()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        _trainer(tmp_path, **length, callbacks=[KillAfter(killed_at, tmp_path / "x.ckpt")]).fit(first, digits())
    _trainer(tmp_path, **length).fit(second, digits(num_workers=workers), ckpt_path=tmp_path / "x.ckpt")
    seen = first.seen + second.seen
    assert len(first.seen) == killed_at and len(seen) == 12
    assert [epoch for epoch, _ in seen] == [epoch for epoch, _ in whole.seen]
    assert _same([batch for _, batch in seen], [batch for _, batch in whole.seen])


def test_a_place_in_another_order_is_refused(digits):
    data, other = digits(), digits(batch_size=5)
    data.setup("fit"), other.setup("fit")
    with pytest.raises(UserError, match="global_batch_size 6, but this run has 5"):
        other.train_dataloader().load_state_dict(data.train_dataloader().state_dict())


def test_a_place_is_kept_on_another_number_of_devices(digits):
    data = digits()
    data.setup("fit")
    single = data.train_dataloader()
    batches = iter(single)
    expected = [next(batches) for _ in range(3)][2][1]
    state = {**single.state_dict(), "batches": 2}
    labels = []
    for rank in range(2):
        sampler = ResumableSampler(data.train_dataset, 1, rank, 2)
        half = ResumableLoader(data.train_dataset, batch_size=3, sampler=sampler)
        half.load_state_dict(state)
        half.sampler.set_epoch(0)
        labels += next(iter(half))[1].tolist()
    assert sorted(labels) == sorted(expected.tolist())


def test_prediction_yields_every_picture_with_its_path_in_order(digits, tmp_path, picture):
    paths = [picture(tmp_path / "new" / name, number) for number, name in enumerate(("b.png", "a.jpg", "sub/c.png"))]
    (tmp_path / "new" / "notes.txt").write_text("x")
    data = digits(predict_folder=str(tmp_path / "new"), eval_batch_size=2)
    results = _trainer(tmp_path).predict(Recorder(), data)
    assert [path for batch in results for path, _ in batch] == sorted(map(str, paths))


def test_real_textures(real_set, preprocess):
    data = FewShotImages(CsvSource(str(real_set("dtd10") / "split.csv")), shots=1, batch_size=4)
    data.preprocess = preprocess
    batches = _epoch(data, 0)
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert data.prompts()[0] == "a photo of a banded."
