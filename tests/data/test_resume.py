"""A killed run goes on with the batches it would have had: same pictures, same pixels, same order."""

from __future__ import annotations

import lightning
import pytest
import torch
from torch import nn

from vision_peft.data.loader import ResumableLoader
from vision_peft.data.sampler import ResumableSampler
from vision_peft.errors import UserError


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
    for (_, (images, labels)), (_, (expected_images, expected_labels)) in zip(seen, whole.seen):
        assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


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
