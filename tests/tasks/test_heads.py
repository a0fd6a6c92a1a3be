"""Starts of the heads against scikit-learn, their forward formulas, and CLIP's text features kept or recomputed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from small_runs import clip, lora, vit

from vision_peft.engine.install import adapters_off, attach
from vision_peft.errors import UserError
from vision_peft.tasks.heads import STRENGTHS, WITHOUT_VALIDATION, CosineHead, FrozenFeatures, LinearHead, TextHead

PROMPTS = ["a photo of a cat.", "a photo of a dog.", "a photo of a three-toed sloth."]


class Sized:
    """As much of a backbone as a head without text looks at."""

    def __init__(self, num_features: int) -> None:
        self.num_features = num_features


def real(classes: int, size: int = 120) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (N, 64) and labels of the first `classes` digits, and other features to predict."""
    X, y = load_digits(return_X_y=True)
    X, y = torch.from_numpy(X).float()[y < classes], torch.from_numpy(y)[y < classes]
    return X[:size], y[:size], X[size : size + 300]


def predict(weights: tuple[torch.Tensor, torch.Tensor], X: torch.Tensor) -> torch.Tensor:
    return F.linear(X, *weights)


@pytest.mark.parametrize("classes", [2, 10])
def test_nearest_mean_predicts_as_scikit_learn(classes):
    X, y, new = real(classes)
    found = predict(FrozenFeatures(X, y, classes).nearest_mean(), new).argmax(1)
    expected = NearestCentroid().fit(X.numpy(), y.numpy()).predict(new.numpy())
    assert found.tolist() == expected.tolist()
    assert set(expected) == set(range(classes))


def test_nearest_mean_keeps_its_logits_moderate():
    X, y, new = real(10)
    logits = predict(FrozenFeatures(X, y, 10).nearest_mean(), new)
    assert 1 < logits.abs().max() < 50


@pytest.mark.parametrize("classes", [2, 10])
def test_logistic_regression_gives_the_probabilities_of_scikit_learn(classes):
    X, y, new = real(classes)
    found = predict(FrozenFeatures(X, y, classes).logistic_regression(0.1), new).softmax(1)
    mean = X.mean(0)
    scale = (X - mean).square().mean().sqrt()
    solver = LogisticRegression(C=0.1, max_iter=500).fit(((X - mean) / scale).numpy(), y.numpy())
    expected = torch.from_numpy(solver.predict_proba(((new - mean) / scale).numpy())).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_strength_of_a_probe_is_chosen_by_the_held_out_pictures():
    X, y, new = real(10, 60)
    held_out = new[:200], torch.from_numpy(load_digits(return_X_y=True)[1])[60:260]
    frozen = FrozenFeatures(X, y, 10, held_out)
    accuracies = []
    for strength in STRENGTHS:
        accuracies.append(
            (predict(FrozenFeatures(X, y, 10).logistic_regression(strength), held_out[0]).argmax(1) == held_out[1]).float().mean()
        )
    best = STRENGTHS[max(range(len(STRENGTHS)), key=accuracies.__getitem__)]
    assert len({a.item() for a in accuracies}) > 1
    expected = predict(FrozenFeatures(X, y, 10).logistic_regression(best), new).softmax(1)
    torch.testing.assert_close(predict(frozen.logistic_regression(), new).softmax(1), expected, rtol=0, atol=2e-3)


def test_strength_without_held_out_pictures_is_announced(caplog):
    X, y, _ = real(3)
    with caplog.at_level("INFO"):
        weights = FrozenFeatures(X, y, 3).logistic_regression()
    assert "no validation pictures" in caplog.text
    torch.testing.assert_close(weights, FrozenFeatures(X, y, 3).logistic_regression(WITHOUT_VALIDATION))


@pytest.mark.parametrize("start", ["nearest_mean", "logistic_regression"])
def test_a_class_without_pictures_is_never_predicted(start):
    X, y, new = real(3)
    y = torch.where(y == 1, 3, y)  # classes 0, 2, 3 of four
    weights = getattr(FrozenFeatures(X, y, 4), start)()
    for features in (new, 0.01 * new):  # near the origin too, where an absent class's mean of zeros would lie
        predicted = predict(weights, features).argmax(1)
        assert 1 not in predicted
    seen = [0, 2, 3]
    renamed = torch.tensor([0, -1, 1, 2])[y]
    alone = predict(getattr(FrozenFeatures(X, renamed, 3), start)(), new)
    torch.testing.assert_close(predict(weights, new)[:, seen].softmax(1), alone.softmax(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("init, start", [("class_means", "nearest_mean"), ("linear_probe", "logistic_regression")])
def test_linear_head_starts_there(init, start):
    X, y, new = real(3)
    frozen, head = FrozenFeatures(X, y, 3), LinearHead(init)
    assert head.needs_features
    head.build(Sized(64), PROMPTS, frozen)
    assert torch.equal(head(new), predict(getattr(frozen, start)(), new))


def test_linear_head_without_a_start():
    assert not LinearHead("zeros").needs_features
    for head in (LinearHead("zeros"), LinearHead()):  # nothing is trained in a test: no features are made
        head.build(Sized(64), PROMPTS, None)
        assert head.weight.shape == (3, 64)
        assert not head.weight.any()
        assert head.bias.tolist() == [0, 0, 0]


def test_cosine_head():
    X, y, new = real(3)
    head = CosineHead(scale=7.0)
    head.build(Sized(64), PROMPTS, FrozenFeatures(X, y, 3))
    means = torch.stack([X[y == label].mean(0) for label in range(3)])
    centre = means.mean(0)
    expected = 7 * F.cosine_similarity((new - centre)[:, None], (means - centre)[None], dim=2)
    torch.testing.assert_close(head(new), expected, rtol=1e-5, atol=1e-4)
    assert [name for name, _ in head.named_parameters()] == ["prototypes"]
    with torch.no_grad():
        head.prototypes.mul_(3.0)  # lengths do not count
    torch.testing.assert_close(head(new), expected, rtol=1e-5, atol=1e-4)
    fresh = CosineHead(scale=7.0)
    fresh.build(Sized(64), PROMPTS, None)
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh(new), head(new))


def test_text_head_needs_a_text_tower():
    with pytest.raises(UserError, match=r"model\.head: TextHead needs a backbone with a text tower; Vit has none"):
        TextHead().build(vit(), PROMPTS, None)


def test_text_head_is_the_cosine_and_keeps_frozen_text(tmp_path):
    backbone, head = clip(tmp_path).eval(), TextHead(scale=50.0)
    head.build(backbone, PROMPTS, None)
    assert not list(head.parameters())
    assert not head.state_dict()
    features = torch.randn(4, 32)
    with torch.no_grad():
        text = backbone.encode_text(backbone.tokenize(PROMPTS))
        expected = 50 * F.cosine_similarity(features[:, None], text[None], dim=2)
    torch.testing.assert_close(head(features), expected, rtol=1e-5, atol=1e-4)
    calls = counted(backbone)
    backbone.adapted = frozenset({"vision.0.attn.q"})  # the text tower does not change
    head(features), head(features)
    assert calls == []
    assert not head(features).requires_grad


def test_text_head_recomputes_adapted_text(tmp_path):
    backbone, head = clip(tmp_path).eval(), TextHead()
    head.build(backbone, PROMPTS, None)
    features = torch.randn(4, 32)
    before = head(features)
    adapters = attach(backbone.network, lora(), "text:qv", sites=backbone.sites())
    backbone.adapted = frozenset(site.target for site in adapters.sites)
    calls = counted(backbone)
    torch.testing.assert_close(head(features), before, rtol=1e-4, atol=1e-4)  # LoRA starts at the identity
    head(features)[:, 0].sum().backward()
    assert len(calls) == 2
    moving = {name: p for name, p in adapters.named_parameters() if name.endswith(".B")}
    assert all(p.grad.any() for p in moving.values())
    with torch.no_grad():
        for p in moving.values():
            p.add_(torch.randn_like(p))
    changed = head(features)
    assert (changed - before).abs().max() > 1e-2
    backbone.adapted = frozenset()  # told that nothing changes any more, it computes once and keeps
    assert torch.equal(head(features), head(features))
    assert len(calls) == 4


def test_evaluation_encodes_adapted_text_once(tmp_path):
    backbone, head = clip(tmp_path).eval(), TextHead().eval()
    head.build(backbone, PROMPTS, None)
    adapters = attach(backbone.network, lora(), "text:qv", sites=backbone.sites())
    backbone.adapted = frozenset(site.target for site in adapters.sites)
    calls, features = counted(backbone), torch.randn(4, 32)
    with torch.no_grad():
        first = head(features)
        assert torch.equal(head(features), first) and len(calls) == 1
        for name, parameter in adapters.named_parameters():
            if name.endswith(".B"):
                parameter.add_(0.5)
        changed = head(features)
        assert len(calls) == 2 and not torch.allclose(changed, first)
        with adapters_off(backbone.network):
            torch.testing.assert_close(head(features), first, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert head(features).dtype != torch.float64 and len(calls) == 4
        backbone.train().eval()
        head(features)
        assert len(calls) == 5
    head(features).sum().backward()  # with gradients always anew
    assert len(calls) == 6 and any(parameter.grad is not None for parameter in adapters.parameters())


def test_a_copied_task_head_reads_the_copied_backbone(tmp_path):
    backbone, head = clip(tmp_path), TextHead()
    head.build(backbone, PROMPTS, None)
    copied_backbone, copied_head = copy.deepcopy((backbone, head))
    assert copied_head.backbone is copied_backbone


def counted(backbone) -> list[int]:
    """Grows by one whenever the text tower runs."""
    calls: list[int] = []
    encode = backbone.encode_text

    def counting(tokens):
        calls.append(len(tokens))
        return encode(tokens)

    backbone.encode_text = counting
    return calls
