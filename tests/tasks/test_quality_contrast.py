"""Momentum contrast: its loss, its queue, its following copy, and what the task makes of them."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from small_runs import vit
from timm.optim import Lars
from torch import nn

from vision_peft.adapters.dora import DoRA
from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.salt import SALT
from vision_peft.backbones.encoder_folder import load_encoder
from vision_peft.backbones.vit import Vit
from vision_peft.data.pristine_images import PristineImages
from vision_peft.engine.callback import AdapterCallback
from vision_peft.engine.store import read_config
from vision_peft.errors import UserError
from vision_peft.tasks.momentum_contrast import FollowingCopy, KeyQueue, ProjectionHead, contrast
from vision_peft.tasks.quality_contrast import QualityContrast


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("same_image", [True, False])
def test_the_loss_is_the_formula(same_image):
    query, key, queue = codes(2, 3, 8), codes(2, 3, 8, seed=1), codes(5, 8, seed=2)
    terms = []
    for picture in range(2):
        for version in range(3):
            q = query[picture, version]
            negatives = [float(q @ each) for each in queue]
            if same_image:
                negatives += [float(q @ key[picture, other]) for other in range(3) if other != version]
            positive = math.exp(float(q @ key[picture, version]) / 0.2)
            terms.append(-math.log(positive / (positive + sum(math.exp(each / 0.2) for each in negatives))))
    assert float(contrast(query, key, queue, 0.2, same_image)) == pytest.approx(np.mean(terms), rel=1e-5)


def test_the_loss_of_a_perfect_pair_among_orthogonal_negatives():
    q = torch.eye(8)[:1][None]
    assert float(contrast(q, q, torch.eye(8)[1:], 0.2, True)) == pytest.approx(math.log(1 + 7 * math.exp(-5)), rel=1e-5)


def test_the_queue_wraps_and_keeps_the_latest():
    queue = KeyQueue(10, 4, torch.Generator().manual_seed(0))
    assert torch.allclose(queue.keys.norm(dim=1), torch.ones(10))
    pushed = codes(5, 3, 4)
    for step in range(5):
        queue.push(pushed[step])
        assert int(queue.place) == 3 * (step + 1) % 10
    latest = pushed.flatten(0, 1)[-10:]
    assert sorted(map(tuple, queue.keys.tolist())) == sorted(map(tuple, latest.tolist()))
    queue.push(codes(25, 4, seed=5))  # more than it holds
    assert sorted(map(tuple, queue.keys.tolist())) == sorted(map(tuple, codes(25, 4, seed=5)[-10:].tolist()))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.norm, self.trained = nn.Linear(3, 4).requires_grad_(False), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.trained(self.norm(self.frozen(x)))


def test_the_copy_follows_what_is_trained_and_nothing_else():
    module = Small()
    copy = FollowingCopy(module)
    x = torch.randn(6, 3)
    assert set(copy.averaged) == {"norm.weight", "norm.bias", "trained.weight", "trained.bias"}
    assert torch.equal(copy(module, x), module(x))
    start = module.trained.weight.detach().clone()
    with torch.no_grad():
        module.trained.weight.add_(1.0)
    copy.follow(module, 1.0)
    assert torch.equal(copy.get_buffer("trained/weight"), start)
    copy.follow(module, 0.75)
    assert torch.allclose(copy.get_buffer("trained/weight"), start + 0.25)
    copy.follow(module, 0.0)
    assert torch.equal(copy.get_buffer("trained/weight"), module.trained.weight)


def test_statistics_of_the_copy_are_its_own():
    module = Small()
    copy, before = FollowingCopy(module), module.norm.running_mean.clone()
    copy(module, torch.randn(20, 3) + 5)
    assert torch.equal(module.norm.running_mean, before) and not torch.equal(copy.get_buffer("norm/running_mean"), before)


def test_lars_scales_matrices_and_leaves_vectors_alone():
    def step(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        head = ProjectionHead(6, 4)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.copy_(torch.randn_like(parameter) * (scale if parameter.ndim > 1 else 1))
                parameter.grad = torch.ones_like(parameter) * (scale if parameter.ndim > 1 else 1)
        before = [parameter.detach().clone() for parameter in head.parameters()]
        Lars(head.param_groups(0.5), lr=0.5, momentum=0.9, weight_decay=1e-4).step()
        moved = [before - after.detach() for before, after in zip(before, head.parameters())]
        return moved[0], moved[1]

    (matrix, vector), (larger, same) = step(1.0), step(3.0)
    assert torch.allclose(larger, 3 * matrix, rtol=1e-2)
    assert torch.allclose(vector, torch.full_like(vector, 0.5)) and torch.equal(vector, same)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path))
    (tmp_path / "p").mkdir()
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((140, 140), Image.Resampling.BICUBIC).save(tmp_path / "p" / f"{i}.png")
    return tmp_path


def run(folder, backbone: Vit, method=None, steps: int = 2, data=None, **options) -> tuple[QualityContrast, pl.Trainer]:
    data = data or PristineImages("p", patch=32, distortions=3, batch_size=2)
    task = QualityContrast(backbone, **{"queue": 32, "code": 16, "momentum": 0.9, "schedule": "constant", **options})
    callback = AdapterCallback(method, targets="attn+mlp", folder=str(folder / "adapter"))
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[callback],
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(task, data)
    return task, trainer


@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2), SALT(rank=2)], ids=lambda each: each.name)
def test_the_key_encoder_follows_the_adapter(pictures, method):
    task, _ = run(pictures, vit(), method)
    images = torch.rand(3, 3, 32, 32)
    task.eval()
    assert not torch.equal(task.keys(task, images), task(images)), "m = 0.9: behind"
    task.keys.follow(task, 0.0)
    assert torch.allclose(task.keys(task, images), task(images), atol=1e-6)
    copied = sum(task.keys.get_buffer(name.replace(".", "/")).numel() for name in task.keys.averaged)
    assert copied == task.adapters.num_trainable() + sum(each.numel() for each in task.head.parameters())
    assert int(task.queue.place) == 2 * 2 * 8 % 32  # steps, pictures, versions at two scales


def test_what_only_training_needs_is_not_exported(pictures):
    task, _ = run(pictures, vit(), LoRA(rank=2))
    config = read_config(pictures / "adapter")
    assert config["parts"] == [] and config["input"]["mean"] == list(task.backbone.preprocess.mean)
    assert not any(key.startswith("parts.") for key in load_file(pictures / "adapter" / "adapter_model.safetensors"))
    assert {"head", "queue", "keys", "adapters"} == set(task.parts)


def test_a_whole_encoder_is_trained_statistics_included_and_written(pictures):
    torch.manual_seed(0)
    task, _ = run(pictures, Vit("test_efficientnet", image_size=32, pretrained=False), whole=True, normalize="none")
    fresh = Vit("test_efficientnet", image_size=32, pretrained=False)
    torch.manual_seed(0)
    fresh.load()
    trained, start = task.backbone.network.state_dict(), fresh.network.state_dict()
    moved = [key for key in trained if key.endswith("running_mean") and not torch.equal(trained[key], start[key])]
    assert len(moved) == sum(key.endswith("running_mean") for key in trained)
    backbone, facts = load_encoder(pictures / "encoder")
    assert facts["input"] == {"mean": [0.0] * 3, "std": [1.0] * 3}
    assert all(torch.equal(value, trained[key]) for key, value in backbone.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_bad_settings(pictures):
    for options in ({"momentum": 1.5}, {"queue": 0}, {"temperature": 0.0}):
        with pytest.raises(UserError, match=rf"model\.{next(iter(options))}"):
            QualityContrast(vit(), **options)
    with pytest.raises(UserError, match=r"model\.whole: .* set adapter\.method to null"):
        run(pictures, vit(), LoRA(rank=2), whole=True)


def test_training_tells_distortions_apart_across_contents(pictures):
    """The key of a query's own version becomes the most similar among its picture's four; one of the others shows the query's content."""
    data = PristineImages("p", patch=32, distortions=3, kinds=["gaussian_noise", "gaussian_blur", "brighten"], batch_size=2, val_share=0.3)
    options = {"queue": 8, "momentum": 0.5, "optimizer": lambda params: torch.optim.AdamW(params, lr=3e-3)}
    task, trainer = run(pictures, vit(name="test_resnet"), steps=200, data=data, whole=True, **options)
    assert trainer.validate(task, data, verbose=False)[0]["val/match"] > 0.5, "chance is 0.25"
