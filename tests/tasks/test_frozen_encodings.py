"""What the frozen parts around a denoiser say is kept exactly: training on it is training on pictures and prompts themselves."""

from __future__ import annotations

import pytest
import torch
from generators import stable_diffusion, unconditional

from vision_peft.backbones import Diffusion
from vision_peft.tasks import frozen_encodings
from vision_peft.tasks.frozen_encodings import FrozenEncodings
from vision_peft.user_cache import cache_folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    backbone = Diffusion(str(stable_diffusion(tmp_path_factory.mktemp("text") / "model")))
    backbone.load()
    return backbone


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def refuse(*_: object) -> None:
    raise AssertionError("computed again")


def test_latents_drawn_from_what_is_kept_are_those_of_the_pictures(text, images):
    kept = FrozenEncodings(text, "memory").posteriors(images)
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    with torch.no_grad():
        straight = text.encode(images / 127.5 - 1, draws[0])
    torch.testing.assert_close(text.draw(kept, draws[1]), straight, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(text.draw(kept), straight)  # the mode is not a sample


def test_disk_answers_for_the_same_pictures_and_only_for_them(text, images, monkeypatch):
    first = FrozenEncodings(text, "disk").posteriors(images)
    again = FrozenEncodings(text, "disk")
    with monkeypatch.context() as patched:
        patched.setattr(text, "posterior", refuse)
        torch.testing.assert_close(again.posteriors(images), first, rtol=0, atol=0)
        with pytest.raises(AssertionError, match="computed again"):
            again.posteriors(images.flip(3))
    with torch.no_grad():
        text.vae.quant_conv.bias.add_(1.0)
    try:
        assert not torch.allclose(FrozenEncodings(text, "disk").posteriors(images), first)
    finally:
        with torch.no_grad():
            text.vae.quant_conv.bias.sub_(1.0)


def test_prompts_are_encoded_once_and_from_disk_not_at_all(text, monkeypatch):
    straight = text.condition(["a b", "c", "a b"])
    kept = FrozenEncodings(text, "disk").condition(["a b", "c", "a b"])
    torch.testing.assert_close(kept, straight, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(text, "condition", refuse)
    again = FrozenEncodings(text, "disk").condition(["c", "a b"])
    torch.testing.assert_close(again["encoder_hidden_states"], straight["encoder_hidden_states"][1:])


def test_memory_leaves_nothing_on_disk(text, images, tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_PEFT_CACHE", str(tmp_path))
    FrozenEncodings(text, "memory").posteriors(images)
    FrozenEncodings(text, "memory").condition(["a"])
    assert not cache_folder("latents").exists() and not cache_folder("prompts").exists()


def test_an_unconditional_model_is_told_nothing(tmp_path):
    backbone = Diffusion(str(unconditional(tmp_path / "plain")))
    backbone.load()
    assert FrozenEncodings(backbone, "memory").condition(["", ""]) == {}


def test_nested_conditions_survive_the_file(text):
    added = {"text_embeds": torch.zeros(1, 3), "time_ids": torch.ones(1, 6)}
    condition = {"encoder_hidden_states": torch.ones(1, 2), "added_cond_kwargs": added}
    torch.testing.assert_close(frozen_encodings._nested(frozen_encodings._flat(condition)), condition)
