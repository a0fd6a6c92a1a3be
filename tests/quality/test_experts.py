"""Experts against computations that do not go through them: an adapted encoder, tiles, large pictures, sensitivity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

from vision_peft.adapters.lora import LoRA
from vision_peft.backbones import Vit
from vision_peft.cli import main
from vision_peft.engine.install import attach, detach
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError
from vision_peft.quality import experts
from vision_peft.quality.experts import features, open_expert
from vision_peft.quality.sensitivity import sensitivity

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def unit(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@pytest.fixture
def adapter(tmp_path):
    """LoRA on a small ResNet in a file of weights; its second factors are not zero."""
    torch.manual_seed(0)
    first = Vit("test_resnet", pretrained=False, image_size=32)
    first.load()
    save_file(first.network.state_dict(), tmp_path / "weights.safetensors")
    backbone = Vit("test_resnet", weights=str(tmp_path / "weights.safetensors"), image_size=32)
    backbone.load()
    attach(backbone.network, LoRA(rank=2), "conv", sites=backbone.sites())
    facts = {"input": {"mean": list(MEAN), "std": list(STD)}}
    folder = save_adapter(tmp_path / "adapter", backbone.network, backbone=backbone.describe(), resized=backbone.resized, extra=facts)
    weights = load_file(folder / "adapter_model.safetensors")
    drawn = {key: torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.1 for key, value in weights.items()}
    save_file(drawn, folder / "adapter_model.safetensors")
    detach(backbone.network)
    load_adapter(backbone.network, folder, sites=backbone.sites())
    return folder, backbone.eval()


def test_an_adapted_expert_is_the_network_with_its_adapter(adapter):
    folder, backbone = adapter
    image = picture(72, 90)
    found = features([open_expert(str(folder))], [image])[0]
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    normal = [(unit(each) - mean) / std for each in (image, image.resize((45, 36)))]
    with torch.no_grad():
        expected = torch.cat([backbone(each) for each in normal], 1)[0]
        detach(backbone.network)
        plain = backbone(normal[0])[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found[: len(plain)], plain, rtol=0.05)


def test_tiles_are_averaged_by_area():
    image = unit(picture(72, 170))
    plain = open_expert("random:test_resnet")
    tiled = open_expert("random:test_resnet", tile=64)
    columns = ((0, 56), (56, 113), (113, 170))
    parts = [image[..., top:bottom, left:right] for top, bottom in ((0, 36), (36, 72)) for left, right in columns]
    areas = [part.shape[-1] * part.shape[-2] for part in parts]
    expected = sum(plain(part) * area for part, area in zip(parts, areas)) / sum(areas)
    torch.testing.assert_close(tiled(image), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(open_expert("random:test_resnet", tile=200)(image), plain(image))
    assert tiled.describe() != plain.describe(), "a regressor must tell them apart"


def test_a_picture_of_20_megapixels_needs_tiles(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experts, "LARGEST", 200 * 100)  # megapixels take a minute; the rule does not depend on their number
    picture(128, 256).save(tmp_path / "huge.png")
    words = ["quality", "extract", "--images", str(tmp_path), "--experts", "random:test_vit", "--folder", str(tmp_path / "f")]
    assert main(words) == 2
    assert "huge.png: is 256 x 128 pixels; above" in (said := capsys.readouterr().err) and "--tile" in said
    assert main([*words, "--tile", "64"]) == 0


def test_bf16_is_near_and_told_apart():
    image = unit(picture(96, 96))
    exact, fast = open_expert("random:test_vit"), open_expert("random:test_vit", bf16=True)
    difference = (fast(image) - exact(image)).norm() / exact(image).norm()
    assert 0 < difference < 0.1
    assert fast.describe() != exact.describe()


def test_the_classical_expert_opens_by_name_and_a_folder_of_nothing_does_not(tmp_path):
    assert features([open_expert("classical:brisque")], [picture(80, 80)]).shape == (1, 36)
    with pytest.raises(UserError, match="no adapter and no encoder"):
        open_expert(str(tmp_path))


def test_sensitivity_of_scores_whose_answer_is_known():
    def sharpness(pictures):
        return np.array([np.abs(np.diff(np.asarray(each, np.float64), axis=1)).mean() for each in pictures])

    clean = [picture(96, 96, seed).filter(ImageFilter.SHARPEN) for seed in (0, 1)]
    blur, noise = sensitivity(sharpness, clean, ["lens_blur", "gaussian_noise"])
    assert blur.falls and blur.spearman == pytest.approx(-1)
    assert not noise.falls and noise.spearman > 0.9
    np.testing.assert_allclose(blur.scores[:, 0], sharpness(clean))
    [flat] = sensitivity(lambda pictures: np.zeros(len(pictures)), clean, ["lens_blur"])
    assert not flat.falls and flat.spearman == 0


def test_sensitivity_by_command_on_the_held_out_part(tmp_path, capsys):
    rows = ["path,mos"]
    for seed in range(30):
        blurred = picture(80, 80, seed).filter(ImageFilter.GaussianBlur(seed / 12))
        blurred.save(tmp_path / f"{seed}.png")
        rows.append(f"{tmp_path / f'{seed}.png'},{-seed}")
    (tmp_path / "scores.csv").write_text("\n".join([*rows, ""]))
    (tmp_path / "split.csv").write_text(f"path,split\n{tmp_path / '0.png'},val\n{tmp_path / '1.png'},train\n")
    scores, folder, regressor = str(tmp_path / "scores.csv"), str(tmp_path / "f"), str(tmp_path / "r")
    assert main(["quality", "extract", "--scores", scores, "--experts", "classical:brisque", "--folder", folder]) == 0
    assert main(["quality", "fit", "--scores", scores, "--features", folder, "--regressor", regressor, "--divisions", "2"]) == 0
    capsys.readouterr()
    assert main(["quality", "sensitivity", str(tmp_path / "split.csv"), "--regressor", regressor]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len([line for line in lines if line.split()[-2:][0] in ("yes", "no")]) == 26
    assert "of 26 distortions" in lines[-1]
    assert main(["quality", "score", str(tmp_path / "0.png"), "--regressor", regressor]) == 0
    clean = capsys.readouterr().out.split()[0]
    assert float(clean) == pytest.approx(float(next(line for line in lines if line.startswith("jpeg")).split()[1]), abs=1e-3)
