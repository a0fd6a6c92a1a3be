"""CoOp: given words are those words, only the context is trained, others' prompts pass unchanged, and a state is read back."""

from __future__ import annotations

import pytest
import torch
from small_runs import adam, clip, digits, trainer, vit

from vision_peft.errors import UserError
from vision_peft.tasks.coop import CoOpHead
from vision_peft.tasks.fewshot_classification import FewShotClassification
from vision_peft.tasks.heads import TextHead

NAMES = ["cat.", "three-toed sloth.", "x ray."]


def built(backbone, prompts=NAMES, **options) -> CoOpHead:
    head = CoOpHead(**options)
    head.build(backbone, prompts, None)
    return head


def test_context_started_at_words_is_those_words(tmp_path):
    backbone = clip(tmp_path).eval()
    words = TextHead()
    words.build(backbone, [f"a photo of a {name}" for name in NAMES], None)
    features = torch.randn(4, 32)
    expected = words(features)
    head = built(backbone, context_init="a photo of a")
    assert head.context.shape == (4, 48)
    torch.testing.assert_close(head(features), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(words(features), expected)  # the hook leaves prompts without placeholders alone
    backbone._remembered = None
    torch.testing.assert_close(words(features), expected)


@pytest.mark.parametrize("options", [{}, {"text_checkpointing": True, "text_chunk": 2}])
def test_gradients_reach_the_context_alone(options, tmp_path):
    backbone = clip(tmp_path)
    for key, value in options.items():
        setattr(backbone, key, value)
    head = built(backbone, context_length=3)
    head(torch.randn(4, 32))[:, 0].sum().backward()
    assert [name for name, _ in head.named_parameters()] == ["context"]
    assert head.context.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in backbone.parameters())
    if options:  # recomputed in the backward pass: the same gradient as without
        plain = clip(tmp_path)
        other = built(plain, context_length=3)
        other.context.data.copy_(head.context)
        features = torch.randn(4, 32)
        grads = [torch.autograd.grad(each(features)[:, 0].sum(), each.context)[0] for each in (head, other)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_text_is_kept_only_while_nothing_changes(tmp_path):
    head = built(clip(tmp_path).eval(), context_length=2)
    features = torch.randn(2, 32)
    with torch.no_grad():
        first = head(features)
        assert head._text() is head._text()
        head.context.add_(torch.randn_like(head.context))
        assert not torch.allclose(head(features), first)


def test_a_run_lowers_the_loss_and_is_read_back(tmp_path):
    def task() -> FewShotClassification:
        torch.manual_seed(0)
        return FewShotClassification(clip(tmp_path), CoOpHead(context_length=4, scale=20.0), optimizer=adam(0.02), cache="off")

    def loss(of: FewShotClassification) -> float:
        with torch.no_grad():
            return sum(of.eval().loss(batch).item() for batch in data.train_dataloader())

    data = digits(template="{}.")
    saving, trained, options = trainer(tmp_path, max_steps=30, enable_checkpointing=True), task(), {"verbose": False}
    saving.fit(trained, datamodule=data)
    untrained = task()
    trainer(tmp_path, max_steps=0).fit(untrained, datamodule=data)
    assert loss(trained) < loss(untrained)
    saving.save_checkpoint(tmp_path / "coop.ckpt")
    read = task()
    found = trainer(tmp_path).test(read, datamodule=data, ckpt_path=tmp_path / "coop.ckpt", weights_only=True, **options)
    assert torch.equal(read.head.context, trained.head.context)
    assert found[0]["test/accuracy"] == saving.test(trained, datamodule=data, **options)[0]["test/accuracy"]


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"context_length: must be at least 1"):
        CoOpHead(context_length=0)
    with pytest.raises(UserError, match="needs a backbone with a text tower"):
        built(vit())
    with pytest.raises(UserError, match=r"context_init: '' has no words"):
        built(clip(tmp_path), context_init="")
