"""Few-shot classification: test figures against plain numpy, the files a test and a prediction write, methods that need evidence."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, f1_score
from small_runs import adam, clip, digits, fit, lora, trainer, vit
from torch import nn

from vision_peft.adapters.lora_ga import LoRAGA
from vision_peft.data import ImageFolder
from vision_peft.data.fewshot_images import FewShotImages
from vision_peft.engine.callback import AdapterCallback
from vision_peft.engine.install import adapters_off
from vision_peft.engine.store import load_adapter, read_config
from vision_peft.tasks.fewshot_classification import FewShotClassification
from vision_peft.tasks.heads import CosineHead, LinearHead, TextHead


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A trained task with its data and the folder of its run."""
    folder = tmp_path_factory.mktemp("run")
    task, data = FewShotClassification(vit(), LinearHead("class_means"), optimizer=adam()), digits()
    fit(folder, task, data, lora(), max_steps=8)
    return task, data, folder


def direct(task: FewShotClassification, data: FewShotImages) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C) and labels (N,) of the test split by a plain loop."""
    task.eval()
    with torch.no_grad():
        batches = [(task(images).softmax(1), labels) for images, labels in data.test_dataloader()]
    return torch.cat([p for p, _ in batches]).double().numpy(), torch.cat([y for _, y in batches]).numpy()


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return sum(abs(right[place == b].mean() - confidence[place == b].mean()) * (place == b).mean() for b in set(place))


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


# ---- test ----


def test_test_figures(finished, tmp_path):
    task, data, _ = finished
    [logged] = trainer(tmp_path).test(task, datamodule=data, verbose=False)
    probabilities, labels = direct(task, data)
    predicted = probabilities.argmax(1)
    assert len(labels) == 450
    assert 0.2 < (predicted == labels).mean() < 0.999  # neither chance nor perfect: the figures below can be wrong
    assert logged["test/accuracy"] == pytest.approx((predicted == labels).mean(), abs=1e-6)
    assert logged["test/macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-6)
    assert logged["test/calibration_error"] == pytest.approx(calibration_error(probabilities, labels), abs=1e-5)
    assert logged["test/accuracy"] != pytest.approx(logged["test/macro_f1"], abs=1e-6)


def test_figures_start_anew_at_every_test(finished, tmp_path):
    task, data, _ = finished
    first, second = (trainer(tmp_path).test(task, datamodule=data, verbose=False) for _ in range(2))
    assert first == second


def test_calibration_of_logits_that_look_like_probabilities(tmp_path):
    """A head of zeros says one tenth for each of ten classes, whatever the picture; its logits, zeros, must not count as probabilities."""
    data = digits()
    task = FewShotClassification(vit(), LinearHead("zeros"))
    [logged] = trainer(tmp_path).test(task, datamodule=data, verbose=False)
    share = np.mean([record.label == 0 for record in data.test_records])
    assert logged["test/accuracy"] == pytest.approx(share, abs=1e-6)
    assert logged["test/calibration_error"] == pytest.approx(abs(share - 0.1), abs=1e-6)


def test_confusion_and_class_accuracies(finished, tmp_path):
    task, data, _ = finished
    trainer(tmp_path).test(task, datamodule=data, verbose=False)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(2**24)) > 50
    probabilities, labels = direct(task, data)
    matrix = confusion_matrix(labels, probabilities.argmax(1))
    header, *body = rows(tmp_path / "class_accuracy.csv")
    assert header == ["class", "accuracy", "images"]
    assert [name for name, _, _ in body] == data.class_names
    assert [int(images) for _, _, images in body] == matrix.sum(1).tolist()
    assert [float(share) for _, share, _ in body] == pytest.approx((matrix.diagonal() / matrix.sum(1)).tolist(), abs=5e-5)


def test_other_data_than_those_of_the_training(finished, tmp_path):
    """A data module that the task has never seen gets its preprocessing from it too."""
    task, data, _ = finished
    same = trainer(tmp_path / "a").test(task, datamodule=data, verbose=False)
    assert trainer(tmp_path / "b").test(task, datamodule=digits(), verbose=False) == same


def test_a_class_without_test_pictures(tmp_path):
    for label, split, number in [("ant", "train", 0), ("bee", "train", 1), ("ant", "test", 2)]:
        path = tmp_path / "set" / split / label / f"{number}.png"
        path.parent.mkdir(parents=True)
        Image.effect_noise((40, 40), 60).convert("RGB").save(path)
    data = FewShotImages(ImageFolder(str(tmp_path / "set")), shots=1, augment="none")
    trainer(tmp_path).test(FewShotClassification(vit(), LinearHead("zeros")), datamodule=data, verbose=False)
    assert rows(tmp_path / "class_accuracy.csv")[1:] == [["ant", "1.0000", "1"], ["bee", "", "0"]]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_cross_entropy(smoothing, tmp_path):
    task = FewShotClassification(vit(), LinearHead("class_means"), label_smoothing=smoothing)
    fit(tmp_path, task, digits(), lora(), max_steps=1)
    task.eval()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([3, 1, 4, 1])
    logs = task(images).log_softmax(1)
    hard = -logs[torch.arange(4), labels].mean()
    expected = (1 - smoothing) * hard - smoothing * logs.mean()
    torch.testing.assert_close(task.loss((images, labels)), expected)


# ---- what a run leaves ----


def test_the_adapter_folder_is_enough(finished, tmp_path):
    """In plain Python, on a fresh backbone: the same logits as the trained task."""
    task, data, folder = finished
    config = read_config(folder / "adapter")
    assert config["class_names"] == data.class_names
    assert config["targets"] == "attn+mlp"
    assert config["metrics"]["train/loss"] > 0
    backbone, head = vit(), LinearHead("zeros")
    head.build(backbone, config["class_names"], None)
    load_adapter(backbone.network, folder / "adapter", sites=backbone.sites(), resized=backbone.resized, parts={"head": head})
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(head(backbone.eval()(images)), task.eval()(images), rtol=0, atol=1e-6)
        with adapters_off(backbone.network):
            assert not torch.equal(head(backbone(images)), task(images))


@pytest.mark.parametrize("head", [lambda: LinearHead(), lambda: CosineHead()])
def test_a_checkpoint_is_tested_by_a_fresh_task(head, tmp_path):
    """As `vision-peft test --ckpt_path`: the head is filled from the checkpoint, not from training pictures."""
    task = FewShotClassification(vit(), head(), optimizer=adam())
    options = {"enable_checkpointing": False, "max_steps": 3}
    first = trainer(tmp_path, [AdapterCallback(lora())], **options)
    first.fit(task, datamodule=digits())
    first.save_checkpoint(tmp_path / "last.ckpt")
    [expected] = first.test(task, datamodule=digits(), verbose=False)
    fresh = FewShotClassification(vit(), head(), optimizer=adam())
    again = trainer(tmp_path, [AdapterCallback(lora())], **options)
    [found] = again.test(fresh, datamodule=digits(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert found == expected


# ---- prediction ----


@pytest.mark.parametrize("batch", [2, 64])
def test_predictions(finished, batch, tmp_path):
    task, _, _ = finished
    paths = []
    for number in range(5):
        path = tmp_path / "new" / ("a" if number % 2 else "b/c") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((50, 40), 20 + 20 * number).convert("RGB").save(path)
        paths.append(path)
    data = digits(predict_folder=str(tmp_path / "new"), eval_batch_size=batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        returned = trainer(tmp_path / "run").predict(task, datamodule=data)
    header, *body = rows(tmp_path / "run" / "predictions.csv")
    assert header == ["path", "class", "probability"]
    assert [path for path, _, _ in body] == sorted(map(str, paths))
    loader = [images for images, _ in data.predict_dataloader()]
    with torch.no_grad():
        probabilities = task.eval()(torch.cat(loader)).softmax(1)
    torch.testing.assert_close(torch.cat(returned), probabilities, rtol=0, atol=1e-5)
    for (_, name, given), row in zip(body, probabilities):
        assert name == task.class_names[int(row.argmax())]
        assert float(given) == pytest.approx(float(row.max()), abs=2e-5)


# ---- freezing ----


def test_training_leaves_requires_grad_to_the_parts(finished):
    task, _, _ = finished
    assert not any(p.requires_grad for p in task.backbone.parameters())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for part in task.parts.values() for p in part.parameters())


def test_a_calibration_pass_reaches_the_text_tower(tmp_path):
    """Its features are remembered only where nothing in it will change."""
    task = FewShotClassification(clip(tmp_path), TextHead(), optimizer=adam())
    adapter = fit(tmp_path, task, digits(), LoRAGA(rank=2), ["text:qv", "vision:qv"], max_steps=1)
    assert {site.target.partition(".")[0] for site in adapter.adapters.sites} == {"text", "vision"}
