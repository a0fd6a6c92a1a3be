"""BeforeAfter and ZeroShotRetention: what they measure, and where the figures go."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from small_runs import adam, clip, digits, fit, lora, trainer, vit

from vision_peft.engine.callback import AdapterCallback
from vision_peft.engine.install import adapters_off
from vision_peft.engine.store import read_config
from vision_peft.errors import UserError
from vision_peft.tasks.before_after import BeforeAfter
from vision_peft.tasks.fewshot_classification import FewShotClassification
from vision_peft.tasks.heads import LinearHead, TextHead
from vision_peft.tasks.retention import ZeroShotRetention


def logged(folder: Path) -> dict[str, float]:
    """The last value of every column of the run's metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}


def plain_accuracy(task, data) -> float:
    task.eval()
    with torch.no_grad():
        right = [task(images).argmax(1) == labels for images, labels in data.test_dataloader()]
    return float(torch.cat(right).float().mean())


def zero_shot(backbone, data) -> float:
    backbone.eval()
    with torch.no_grad():
        text = F.normalize(backbone.encode_text(backbone.tokenize(data.prompts())), dim=1)
        right = [(F.normalize(backbone(images), dim=1) @ text.T).argmax(1) == labels for images, labels in data.test_dataloader()]
    return float(torch.cat(right).float().mean())


def test_before_and_after(tmp_path, capsys):
    task, data, callback = FewShotClassification(vit(), LinearHead("class_means"), optimizer=adam()), digits(shots=4), BeforeAfter()
    fit(tmp_path, task, data, lora(), max_steps=10, callbacks=[callback], logger=CSVLogger(tmp_path, name="", version=""))
    found, printed = logged(tmp_path), capsys.readouterr().out
    after = plain_accuracy(task, data)
    fresh = FewShotClassification(vit(), LinearHead("class_means"))
    fit(tmp_path / "zero", fresh, digits(shots=4), max_steps=0)
    before = plain_accuracy(fresh, data)
    assert found["before/accuracy"] == pytest.approx(before, abs=1e-6)
    assert found["after/accuracy"] == pytest.approx(after, abs=1e-6)
    assert before != after
    assert f"test accuracy: {before:.4f} before, {after:.4f} after ({len(data.test_records)} images)" in printed
    metrics = read_config(tmp_path / "adapter")["metrics"]
    assert metrics["before/accuracy"] == pytest.approx(before, abs=1e-6)
    assert metrics["after/accuracy"] == pytest.approx(after, abs=1e-6)


def test_measuring_does_not_change_the_run(tmp_path):
    """Same adapters with and without the callback, dropout's random stream included."""
    states = []
    for folder, callbacks in (("a", []), ("b", [BeforeAfter()])):
        task = FewShotClassification(vit(), LinearHead("zeros"), optimizer=adam())
        fit(tmp_path / folder, task, digits(), lora(dropout=0.3), callbacks=callbacks)
        states.append({key: value.clone() for key, value in task.state_dict().items()})
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


@pytest.mark.parametrize("callback", [BeforeAfter, lambda: ZeroShotRetention({"digits": digits()})])
def test_a_resumed_run_keeps_its_first_figure(callback):
    first, second = callback(), callback()
    first.before = 0.25
    second.load_state_dict(first.state_dict())
    assert second.before == 0.25


def test_a_resumed_run_does_not_measure_before_again(tmp_path):
    def parts():
        task = FewShotClassification(vit(), LinearHead("class_means"), optimizer=adam())
        return task, [AdapterCallback(lora()), BeforeAfter()]

    task, callbacks = parts()
    half = trainer(tmp_path, callbacks, max_steps=5)
    half.fit(task, datamodule=digits(shots=4))
    half.save_checkpoint(tmp_path / "last.ckpt")
    again, others = parts()
    trainer(tmp_path, others, max_steps=10).fit(again, datamodule=digits(shots=4), ckpt_path=tmp_path / "last.ckpt")
    assert others[1].before == callbacks[1].before
    assert others[1].before != pytest.approx(plain_accuracy(task, half.datamodule))


# ---- retention ----


def test_retention_without_training_loses_nothing(tmp_path, capsys):
    task = FewShotClassification(clip(tmp_path), TextHead(), optimizer=adam(0.0))
    second = digits(shots=1, template="the number {}.")
    options = {"callbacks": [ZeroShotRetention({"numbers": second})], "logger": CSVLogger(tmp_path, name="", version="")}
    fit(tmp_path, task, digits(), lora(), "qkv", max_steps=2, **options)
    found = logged(tmp_path)
    expected = zero_shot(clip(tmp_path), second)
    assert found["retention/before"] == found["retention/after"] == pytest.approx(expected, abs=1e-6)
    assert found["retention/difference"] == 0
    assert f"zero-shot accuracy on numbers: {expected:.4f} before, {expected:.4f} after" in capsys.readouterr().out


def test_retention_after_training(tmp_path):
    # random towers all but predict one class: only steps this large change what they say
    task = FewShotClassification(clip(tmp_path), TextHead(), optimizer=adam(1.0))
    second = digits(shots=1, template="the number {}.")
    options = {"callbacks": [ZeroShotRetention({"numbers": second})], "logger": CSVLogger(tmp_path, name="", version="")}
    fit(tmp_path, task, digits(shots=4), lora(), "attn+mlp", max_steps=6, **options)
    found = logged(tmp_path)
    with adapters_off(task.backbone.network):
        before = zero_shot(task.backbone, second)
    after = zero_shot(task.backbone, second)
    assert before != after
    assert found["retention/before"] == pytest.approx(before, abs=1e-6)
    assert found["retention/after"] == pytest.approx(after, abs=1e-6)
    assert found["retention/difference"] == pytest.approx(after - before, abs=1e-6)
    assert read_config(tmp_path / "adapter")["metrics"]["retention/after"] == pytest.approx(after, abs=1e-6)


def test_retention_over_several_sets_is_their_mean_and_joins_the_own_accuracy(tmp_path):
    task = FewShotClassification(clip(tmp_path), TextHead(), optimizer=adam(1.0))
    own, sets = digits(shots=4), {"numbers": digits(shots=1, template="the number {}."), "cats": digits(shots=1, template="{} cats.")}
    options = {"callbacks": [ZeroShotRetention(sets)], "logger": CSVLogger(tmp_path, name="", version="")}
    fit(tmp_path, task, own, lora(), "attn+mlp", max_steps=6, **options)
    found = logged(tmp_path)
    after = [zero_shot(task.backbone, data) for data in sets.values()]
    assert [found["retention/numbers/after"], found["retention/cats/after"]] == pytest.approx(after, abs=1e-6)
    kept, learnt = sum(after) / 2, plain_accuracy(task, own)
    assert found["retention/after"] == pytest.approx(kept, abs=1e-6)
    assert found["retention/harmonic"] == pytest.approx(2 / (1 / kept + 1 / learnt), abs=1e-6)


def test_the_runs_own_set_is_no_other_set(tmp_path):
    task = FewShotClassification(clip(tmp_path), TextHead(), optimizer=adam(0.0))
    callback = ZeroShotRetention({"own": digits(), "numbers": digits(template="the number {}.")})
    fit(tmp_path, task, digits(), lora(), "qkv", max_steps=1, callbacks=[callback])
    assert list(callback.sets) == ["numbers"]
    with pytest.raises(UserError, match="names no set besides the run's own"):
        fit(tmp_path, task, digits(), callbacks=[ZeroShotRetention({"own": digits()})], max_steps=1)


def test_retention_needs_a_text_tower(tmp_path):
    task = FewShotClassification(vit(), LinearHead("zeros"))
    with pytest.raises(UserError, match="ZeroShotRetention needs a backbone with a text tower; Vit has none"):
        fit(tmp_path, task, digits(), lora(), callbacks=[ZeroShotRetention({"digits": digits()})])
