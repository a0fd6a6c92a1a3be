"""Tip-Adapter: its formula in plain numpy, the search, what is trained, and a state read back without the shots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import adam, clip, digits, fit, lora, trainer, vit

from vision_peft.errors import UserError
from vision_peft.tasks.fewshot_classification import FewShotClassification
from vision_peft.tasks.heads import FrozenFeatures, TextHead
from vision_peft.tasks.tip_adapter import ALPHAS, BETAS, TipAdapterHead

PROMPTS = ["a photo of a cat.", "a photo of a dog.", "a photo of a sloth."]


def shots(count: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 32, generator=generator), torch.randint(3, (count,), generator=generator)


def test_the_formula_written_out(tmp_path):
    backbone, (features, labels) = clip(tmp_path).eval(), shots()
    head = TipAdapterHead(alpha=0.7, beta=2.5, scale=50.0)
    head.build(backbone, PROMPTS, FrozenFeatures(features, labels, 3))
    queries, _ = shots(4, seed=1)
    found = head(queries).detach().numpy()
    text = F.normalize(backbone.text_features(PROMPTS, frozen=True), dim=1).double().numpy()
    keys, own = (F.normalize(each, dim=1).double().numpy() for each in (features, queries))
    for i, query in enumerate(own):
        for c in range(3):
            cached = sum(np.exp(-2.5 * (1 - query @ key)) for key, label in zip(keys, labels) if label == c)
            assert found[i, c] == pytest.approx(50 * query @ text[c] + 0.7 * cached, rel=1e-4, abs=1e-4)
    assert not list(head.parameters())


def test_without_weight_it_is_zero_shot(tmp_path):
    backbone = clip(tmp_path).eval()
    head, zero_shot = TipAdapterHead(alpha=0.0, beta=1.0), TextHead()
    head.build(backbone, PROMPTS, FrozenFeatures(*shots(), 3))
    zero_shot.build(backbone, PROMPTS, None)
    queries, _ = shots(5, seed=2)
    torch.testing.assert_close(head(queries), zero_shot(queries))


def test_the_search_finds_the_best_of_the_grid(tmp_path):
    backbone, held_out = clip(tmp_path).eval(), shots(60, seed=3)
    head = TipAdapterHead(scale=20.0)
    head.build(backbone, PROMPTS, FrozenFeatures(*shots(30), 3, held_out))

    def accuracy(alpha: float, beta: float) -> float:
        each = TipAdapterHead(alpha, beta, scale=20.0)
        each.build(backbone, PROMPTS, FrozenFeatures(*shots(30), 3))
        return (each(held_out[0]).argmax(1) == held_out[1]).float().mean().item()

    chosen = accuracy(*head.mixture.tolist())
    assert chosen == max(accuracy(alpha, beta) for alpha in ALPHAS[::4].tolist() + [head.mixture[0].item()] for beta in BETAS[::7].tolist())


def test_keys_alone_are_trained_and_read_back(tmp_path):
    task = FewShotClassification(clip(tmp_path), TipAdapterHead(train_keys=True), optimizer=adam(), cache="off")
    fit(tmp_path, task, digits(), max_steps=1)
    assert [name for name, _ in task.head.named_parameters()] == ["keys"]
    lengths = task.head.keys.detach().norm(dim=1)
    assert not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4)  # they have left the unit sphere
    saving = trainer(tmp_path, max_steps=2, enable_checkpointing=True)
    again = FewShotClassification(clip(tmp_path), TipAdapterHead(train_keys=True), optimizer=adam(), cache="off")
    saving.fit(again, datamodule=digits())
    saving.save_checkpoint(tmp_path / "tip.ckpt")
    trained = saving.test(again, datamodule=digits(), verbose=False)[0]
    fresh = FewShotClassification(clip(tmp_path), TipAdapterHead(train_keys=True), optimizer=adam(), cache="off")
    read = trainer(tmp_path).test(fresh, datamodule=digits(), ckpt_path=tmp_path / "tip.ckpt", verbose=False, weights_only=True)[0]
    assert torch.equal(fresh.head.keys, again.head.keys) and torch.equal(fresh.head.mixture, again.head.mixture)
    assert read["test/accuracy"] == trained["test/accuracy"]


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"model\.head\.beta: 0 is too small"):
        TipAdapterHead(beta=0)
    with pytest.raises(UserError, match="needs a backbone with a text tower"):
        TipAdapterHead().build(vit(), PROMPTS, None)
    task = FewShotClassification(clip(tmp_path), TipAdapterHead(), optimizer=adam())
    with pytest.raises(UserError, match=r"TipAdapterHead keeps features of the frozen backbone: set adapter\.method to null"):
        fit(tmp_path, task, digits(), lora())
