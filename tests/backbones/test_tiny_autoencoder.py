"""The tiny autoencoder around a denoiser of its latents: sizes, whitening, training and sampling through it, files that are none of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from generators import UNCONDITIONAL, unconditional
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import pil_to_tensor

from vision_peft.backbones import Diffusion
from vision_peft.backbones.tiny_autoencoder import STATISTICS, TinyAutoencoder, load_tiny_autoencoder
from vision_peft.cli import main
from vision_peft.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A generator of latents of 4 x 4, and an autoencoder, both with random weights."""
    folder = tmp_path_factory.mktemp("latent")
    torch.manual_seed(0)
    network = UNet2DModel(**UNCONDITIONAL | {"sample_size": 4, "in_channels": 32, "out_channels": 32})
    DDIMPipeline(network, DDIMScheduler(clip_sample=False)).save_pretrained(folder / "generator")
    told = {"mean": [0.1 * index for index in range(32)], "std": [1 + 0.1 * index for index in range(32)]}
    (folder / "generator" / STATISTICS).write_text(json.dumps(told))
    autoencoder = TinyAutoencoder()
    for part in ("encoder", "decoder"):
        (folder / "taef2").mkdir(exist_ok=True)
        tensors = {key: tensor.half() for key, tensor in getattr(autoencoder, part).state_dict().items()}
        save_file(tensors, folder / "taef2" / f"{part}.safetensors")
    for index in range(4):
        Image.effect_noise((40, 40), 20 * index).convert("RGB").save(folder / f"{index}.png")
    return folder


def test_how_many_numbers_it_has():
    counts = [sum(each.numel() for each in part.parameters()) for part in (TinyAutoencoder().encoder, TinyAutoencoder().decoder)]
    assert counts == [1_338_528, 1_338_499]


def test_the_denoiser_works_on_whitened_latents(place):
    backbone = Diffusion(str(place / "generator"), autoencoder=str(place / "taef2"))
    assert backbone.preprocess.size == 32
    backbone.load()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    plain = load_tiny_autoencoder(place / "taef2")
    latents = plain.encode(images).latents
    channel = torch.arange(32)[:, None, None]
    torch.testing.assert_close(backbone.encode(images), (latents - 0.1 * channel) / (1 + 0.1 * channel), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backbone.decode(backbone.encode(images)), plain.decode(latents)[0], rtol=1e-3, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in backbone.vae.parameters())


def test_adapted_and_sampled_by_command(place, tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_PEFT_CACHE", str(tmp_path / "cache"))
    init = {"name": str(place / "generator"), "autoencoder": str(place / "taef2")}
    backbone = {"class_path": "vision_peft.backbones.Diffusion", "init_args": init}
    settings = {
        "model": {"class_path": "DiffusionFineTuning", "init_args": {"backbone": backbone, "samples": 2, "sample_steps": 2}},
        "data": {"class_path": "GeneratorImages", "init_args": {"images": str(place), "prompt": ""}},
        "adapter": {"method": {"class_path": "LoRA", "init_args": {"rank": 2}}, "targets": "attn"},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", str(tmp_path / "settings.yaml"), "--run", str(tmp_path / "run")]) == 0
    assert main(["sample", str(tmp_path / "run"), "--output", str(tmp_path / "grid.png"), "--count", "2", "--steps", "2"]) == 0
    assert Image.open(tmp_path / "grid.png").width >= 64


def test_what_is_none_of_it(place, tmp_path):
    with pytest.raises(UserError, match="works on 3 channels, and latents of this one have 32"):
        Diffusion(str(unconditional(tmp_path / "pixels")), autoencoder=str(place / "taef2"))
    with pytest.raises(UserError, match=r"holds no encoder\.safetensors"):
        load_tiny_autoencoder(tmp_path)
    for part, content in (("encoder", b"nothing"), ("encoder", None)):
        if content is None:
            save_file({"0.weight": torch.ones(2)}, tmp_path / f"{part}.safetensors")
        else:
            (tmp_path / f"{part}.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"encoder\.safetensors: is no encoder of TAEF2"):
            load_tiny_autoencoder(tmp_path)
    for text in ("{", '{"mean": [1, 2], "std": [1, 2]}', '{"mean": "x"}', json.dumps({"mean": [0] * 32, "std": [0] * 32})):
        (tmp_path / STATISTICS).write_text(text)
        with pytest.raises(UserError, match=r"latents\.json: should hold"):
            load_tiny_autoencoder(place / "taef2", tmp_path / STATISTICS)


def test_real_weights_give_faces_back():
    root = Path(os.environ.get("VISION_PEFT_DATA", "datasets"))
    faces, weights = sorted((root / "gen_faces" / "source").glob("*"))[:4], root.parent / "models" / "taef2"
    if not faces or not weights.is_dir():
        pytest.skip(f"TAEF2's weights are not at {weights}, or no faces at {root}")
    images = torch.stack([pil_to_tensor(Image.open(path).convert("RGB")) for path in faces]) / 127.5 - 1
    autoencoder = load_tiny_autoencoder(weights)
    with torch.no_grad():
        again = autoencoder.decode(autoencoder.encode(images).latents)[0].clamp(-1, 1)
    assert -10 * torch.log10(((again - images) / 2).square().mean()) > 33  # dB; 35.9 over all of them
