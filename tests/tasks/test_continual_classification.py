"""The loss of a task of a sequence against the formula with every class written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_runs import adam, clip, digits, lora, trainer

from vision_peft.engine.callback import AdapterCallback
from vision_peft.errors import UserError
from vision_peft.tasks.continual_classification import ContinualClassification
from vision_peft.tasks.heads import TextHead

SEEN = ["a photo of a cat.", "a photo of a dog.", "a photo of a sloth."]


def prepared(tmp_path, targets: str, seen: int) -> ContinualClassification:
    """Ready for a step on the digits, with adapters on one tower."""
    task = ContinualClassification(clip(tmp_path), TextHead(scale="learned"), optimizer=adam(), cache="off", seen_classes=seen)
    task.backbone.network.logit_scale.data.fill_(2.0)
    trainer(tmp_path, [AdapterCallback(lora(), targets)], max_steps=1).fit(task, datamodule=digits())
    return task.eval()


def test_the_loss_with_all_classes_written_out(tmp_path):
    task = prepared(tmp_path, "vision:qv", seen=3)
    images, labels = batch(task)
    with torch.no_grad():
        z = F.normalize(task.backbone(images), dim=1)
        texts = [*SEEN, *task.trainer.datamodule.prompts()]
        E = F.normalize(task.backbone.encode_text(task.backbone.tokenize(texts)), dim=1)
        s = task.backbone.learned_scale()
        assert s == pytest.approx(7.389, rel=1e-3)
        per_image = s * z @ E.mT
        per_image[:, :3] = -torch.inf
        L_i = F.cross_entropy(per_image, labels + 3)
        per_class = s * E @ z.mT  # rows: seen and current classes, columns: images
        M = torch.zeros(len(E), len(z))
        M[labels + 3, torch.arange(len(z))] = 1.0
        L_t = -(M * per_class.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(task.loss((images, labels)), L_i + L_t, rtol=1e-4, atol=1e-5)


def test_text_alone_has_the_first_term_alone(tmp_path):
    task = prepared(tmp_path, "text:qv", seen=3)
    images, labels = batch(task)
    with torch.no_grad():
        torch.testing.assert_close(task.loss((images, labels)), F.cross_entropy(task(images), labels))


def test_a_negative_number_of_classes(tmp_path):
    with pytest.raises(UserError, match=r"model\.seen_classes: must be at least 0, not -1"):
        ContinualClassification(clip(tmp_path), TextHead(), seen_classes=-1)


def batch(task) -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(task.trainer.datamodule.train_dataloader()))
