"""Cached hidden states change the time of a run and nothing else; on disk they are found again only where everything is the same."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from small_runs import adam, clip, digits, fit, lora, trained, trainer, vit

from vision_peft.backbones.vit import Vit
from vision_peft.data import ImageFolder
from vision_peft.data.dataset import ImageDataset
from vision_peft.data.fewshot_images import FewShotImages
from vision_peft.tasks import cache as cache_file
from vision_peft.tasks.cache import HiddenStates
from vision_peft.tasks.fewshot_classification import FewShotClassification
from vision_peft.tasks.heads import LinearHead, TextHead

LAST = "vision.{4..5}.*"  # of the six blocks of test_vit


class Watch(pl.Callback):
    """What the training loop was fed with, and the validation figures of every epoch."""

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()
        self.validated: list[float] = []

    def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
        self.shapes.add(tuple(batch[0].shape[1:]))
        assert isinstance(trainer.datamodule.train_dataset, HiddenStates) == (task.cache != "off")

    def on_validation_end(self, trainer, task) -> None:
        if not trainer.sanity_checking:
            self.validated.append(float(trainer.callback_metrics["val/loss"]))


def run(folder: Path, cache: str, backbone=None, head=None, targets=LAST, data=None, options=None, method=None, optimizer=None):
    task = FewShotClassification(backbone or vit(), head or LinearHead("class_means"), cache=cache, optimizer=optimizer or adam())
    watch, data = Watch(), data or digits()
    fit(folder, task, data, method or lora(), targets, callbacks=[watch], **(options or {"max_steps": 6}))
    return task, data, watch


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Grows by the number of pictures whenever hidden states are computed."""
    calls: list[int] = []
    compute = HiddenStates._compute

    def counting(self, *args):
        calls.append(len(self))
        return compute(self, *args)

    monkeypatch.setattr(HiddenStates, "_compute", counting)
    return calls


@pytest.mark.parametrize("options", [{"augment": "none"}, {"augment": "clip_lora", "views": 2}, {"augment": "flip", "views": 3}])
def test_training_on_cached_states_gives_the_same_adapter(options, tmp_path):
    """20 pictures, batches of 8: six steps are two epochs, so that the second view and last partial batches are in it."""
    plain, _, pictures = run(tmp_path / "a", "off", data=digits(**options))
    cached, _, states = run(tmp_path / "b", "memory", data=digits(**options))
    assert pictures.shapes == {(3, 32, 32)}
    assert states.shapes != pictures.shapes
    expected, found = trained(plain), trained(cached)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert max(float(value.abs().max()) for key, value in expected.items() if key.endswith(".B")) > 1e-3


def test_the_views_differ(tmp_path):
    """Guards the test above: with a single view it could not see a wrong epoch."""
    data = digits(augment="clip_lora", views=2)
    data.preprocess = vit().preprocess
    data.setup("fit")
    dataset = data.train_dataset
    assert not torch.equal(dataset.at(0, 0), dataset.at(0, 1))
    assert torch.equal(dataset.at(0, 0), dataset.at(0, 2))


@pytest.mark.parametrize("counted", [{"max_epochs": 2, "max_steps": -1}, {"max_epochs": 2, "max_steps": 5}])
def test_a_run_counted_in_epochs_is_fed_states_too(counted, tmp_path):
    """Counting its steps makes Lightning build the training loader early."""
    plain, _, _ = run(tmp_path / "a", "off", options=counted)
    cached, _, states = run(tmp_path / "b", "memory", options=counted)
    assert states.shapes != {(3, 32, 32)}
    for key, value in trained(plain).items():
        torch.testing.assert_close(trained(cached)[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method, targets, cut", [(None, "qv", 6), (lora(), LAST, 4), (lora(), "vision.0.*.q", 0), (lora(), "all", 0)])
def test_the_cut_is_below_the_first_adapted_block(method, targets, cut, tmp_path):
    cuts: list[int | None] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, task) -> None:
            cuts.append(task._cut)

    task = FewShotClassification(vit(), LinearHead("zeros"))
    fit(tmp_path, task, digits(), method, targets, callbacks=[Look()], max_steps=1)
    assert task.backbone.num_blocks == 6
    assert cuts == [cut or None]


def test_no_states_for_pictures_that_never_repeat(tmp_path, computed):
    task = FewShotClassification(vit(), LinearHead("zeros"))
    fit(tmp_path, task, digits(augment="clip_lora"), lora(), LAST, max_steps=1)
    assert computed == []


@pytest.mark.parametrize("kind", ["resnet", "clip"])
def test_a_convolutional_network_and_clip_with_text(kind, tmp_path):
    def start():
        if kind == "clip":
            return clip(tmp_path), TextHead(), ["vision.2.*", "text:qv"]
        return vit(name="test_resnet"), LinearHead("class_means"), "vision.layer4.*conv*"

    # plain descent: AdamW's first steps would enlarge the last bits in which batches of another size differ
    descent = {"optimizer": lambda params: torch.optim.SGD(params, lr=1e-2)}
    plain, _, _ = run(tmp_path / "a", "off", *start(), **descent)
    cached, _, states = run(tmp_path / "b", "memory", *start(), **descent)
    assert states.shapes != {(3, 32, 32)}
    assert max(float(value.abs().max()) for key, value in trained(plain).items() if key.endswith(".B")) > 1e-4
    for key, value in trained(plain).items():
        torch.testing.assert_close(trained(cached)[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_pictures_are_back_after_fit(tmp_path):
    task, data, watch = run(tmp_path, "memory", options={"max_epochs": 1, "max_steps": -1, "limit_val_batches": 1.0})
    assert watch.validated
    for name in ("train_dataset", "val_dataset"):
        assert isinstance(getattr(data, name), ImageDataset)
    assert next(iter(data.train_dataloader()))[0].shape == (8, 3, 32, 32)
    assert task._cut is None


def test_validation_during_training_is_that_of_pictures(tmp_path):
    validating = {"max_epochs": 2, "max_steps": -1, "limit_val_batches": 1.0}
    _, _, pictures = run(tmp_path / "a", "off", options=validating)
    task, data, states = run(tmp_path / "b", "memory", options=validating)
    assert len(states.validated) == 2
    assert states.validated == pytest.approx(pictures.validated, abs=1e-5)
    task.eval()
    with torch.no_grad():
        images, labels = next(iter(data.val_dataloader()))
        assert len(labels) == len(data.val_records)
        assert states.validated[-1] == pytest.approx(float(torch.nn.functional.cross_entropy(task(images), labels)), abs=1e-5)


def test_half_precision_states_are_those_of_autocast(tmp_path):
    precise = {"max_steps": 4, "precision": "bf16-mixed"}
    plain, _, _ = run(tmp_path / "a", "off", options=precise)
    cached, _, _ = run(tmp_path / "b", "memory", options=precise)
    for key, value in trained(plain).items():
        torch.testing.assert_close(trained(cached)[key], value, rtol=0, atol=1e-4)


# ---- on disk ----


def stored() -> list[Path]:
    return sorted(cache_file.cache_folder("hidden_states").glob("*"))


def test_a_second_run_reads_the_states(tmp_path, computed):
    first, _, _ = run(tmp_path / "a", "disk", head=LinearHead("zeros"))
    assert computed == [20, 20]  # training pictures, and as many for validation
    assert len(stored()) == 2
    assert all(path.suffix == ".safetensors" for path in stored())
    second, _, _ = run(tmp_path / "b", "disk", head=LinearHead("zeros"))
    assert computed == [20, 20]
    for key, value in trained(first).items():
        assert torch.equal(trained(second)[key], value), key


@pytest.mark.parametrize("change", ["seed", "weights", "precision", "block", "views", "size"])
def test_whatever_changes_the_states_is_in_the_key(change, tmp_path, computed):
    run(tmp_path / "a", "disk", options={"max_steps": 1}, data=digits(augment="flip", views=2))
    before = len(computed)
    backbone = vit(seed=1) if change == "weights" else vit()
    if change == "size":
        backbone = Vit("test_vit", image_size=48, pretrained=False)
    data = digits(augment="flip", views=3 if change == "views" else 2, seed=2 if change == "seed" else 1)
    options = {"max_steps": 1, "precision": "bf16-mixed" if change == "precision" else "32-true"}
    run(tmp_path / "b", "disk", backbone, data=data, options=options, targets="vision.5.*" if change == "block" else LAST)
    assert len(computed) > before


def folder_of_pictures(root: Path) -> FewShotImages:
    for number in range(8):
        path = root / "train" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            Image.effect_noise((40, 40), 20 + 20 * number).convert("RGB").save(path)
    return FewShotImages(ImageFolder(str(root)), shots=2, batch_size=4, augment="none")


def test_a_rewritten_picture_is_noticed(tmp_path, computed):
    run(tmp_path / "a", "disk", head=LinearHead("zeros"), data=folder_of_pictures(tmp_path / "set"))
    run(tmp_path / "b", "disk", head=LinearHead("zeros"), data=folder_of_pictures(tmp_path / "set"))
    before = len(computed)
    for path in (tmp_path / "set").rglob("*.png"):
        Image.new("RGB", (40, 40), "red").save(path)
    _, _, watch = run(tmp_path / "c", "disk", head=LinearHead("zeros"), data=folder_of_pictures(tmp_path / "set"))
    assert before == 2
    assert len(computed) == 4
    assert watch.shapes


def test_two_random_networks_share_nothing(tmp_path, computed):
    """Their descriptions are the same; only the fingerprint, here of a task without adapters, tells them apart."""
    for seed in (0, 1, 0):
        task = FewShotClassification(vit(seed), LinearHead("zeros"), cache="disk")
        trainer(tmp_path, max_steps=1).fit(task, datamodule=digits())
    assert len(computed) == len(stored()) == 4


def test_the_features_a_head_starts_from_are_kept_too(tmp_path, computed):
    heads = []
    for folder in ("a", "b"):
        task, _, _ = run(tmp_path / folder, "disk", method=lora(), targets=LAST, options={"max_steps": 1})
        heads.append(task.head.weight)
    assert computed == [20, 20, 20]  # the head's, training's, validation's
    assert torch.equal(*heads)
    plain, _, _ = run(tmp_path / "c", "off", options={"max_steps": 1})
    torch.testing.assert_close(plain.head.weight, heads[0], rtol=0, atol=1e-5)


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def broken(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="no space"):
        run(tmp_path, "disk")
    assert stored() == []
