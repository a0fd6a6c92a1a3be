"""The distortion bank: what is known of each entry, ranges, draws, and conversions of colour."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_image

from vision_peft.data.distortions import BANK, LEVELS, distort
from vision_peft.data.distortions.colour import hsv_to_rgb, lab_to_rgb, rgb_to_hsv, rgb_to_lab
from vision_peft.data.distortions.filters import lens_blur, translate
from vision_peft.errors import UserError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """(3, 96, 120): a part of a photograph that comes with scikit-learn."""
    whole = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1).float() / 255
    return whole[:, 140:236, 200:320].contiguous()


def test_there_are_26_with_5_levels_each():
    assert len(BANK) == 26 and all(len(entry.levels) == LEVELS for entry in BANK.values())


@pytest.mark.parametrize("name", BANK)
def test_shape_range_and_the_same_result_for_the_same_generator(name, picture):
    state = torch.get_rng_state()
    for level in range(1, LEVELS + 1):
        out = distort(picture, name, level, seeded(level))
        assert out.shape == picture.shape and out.dtype == torch.float32
        assert out.min() >= 0 and out.max() <= 1 and torch.isfinite(out).all()
        assert torch.equal(out, distort(picture, name, level, seeded(level)))
    assert torch.equal(torch.get_rng_state(), state), "it drew from the global generator"


@pytest.mark.parametrize("name", [name for name, entry in BANK.items() if entry.severity])
def test_a_higher_level_is_further_from_the_picture(name, picture):
    away = [(distort(picture, name, level, seeded()) - picture).square().mean().sqrt() for level in (1, 3, 5)]
    assert away[0] < min(away[1:])  # a shift of colours saturates, so that the last two may be equal


@pytest.mark.parametrize("name", BANK)
def test_tiny_pictures_pass(name):
    out = distort(torch.rand(3, 12, 9), name, 5, seeded())
    assert out.shape == (3, 12, 9) and torch.isfinite(out).all()


def test_identities(picture):
    assert torch.equal(distort(picture, "mean_shift", 3, seeded()), picture)
    for name in ("gaussian_blur", "saturation_lab"):
        assert (distort(picture, name, 1, seeded()) - picture).abs().max() < 1 / 255


def test_noise_has_the_variance_of_its_level():
    grey = torch.full((3, 256, 256), 0.5)
    for level, variance in enumerate(BANK["gaussian_noise"].levels, start=1):
        assert float(distort(grey, "gaussian_noise", level, seeded()).var()) == pytest.approx(variance, rel=0.03)
        found = float(distort(grey, "multiplicative_noise", level, seeded()).var())
        assert found == pytest.approx(BANK["multiplicative_noise"].levels[level - 1] / 4, rel=0.05)
    struck = distort(grey, "impulse_noise", 5, seeded())
    assert float((struck != 0.5).float().mean()) == pytest.approx(0.03, rel=0.1)
    assert float((struck == 0).float().mean()) == pytest.approx(0.015, rel=0.15)


def test_blur_is_pillows_and_kernels_keep_brightness(picture):
    ours = distort(picture, "gaussian_blur", 4, seeded())
    pil = Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))
    theirs = torch.from_numpy(np.array(pil)).permute(2, 0, 1) / 255
    assert (ours - theirs).abs()[:, 8:-8, 8:-8].max() < 0.02
    grey = torch.full((3, 40, 40), 0.3)
    for name in ("gaussian_blur", "lens_blur", "motion_blur"):
        torch.testing.assert_close(distort(grey, name, 5, seeded()), grey)
    spot = torch.zeros(1, 41, 41)
    spot[0, 20, 20] = 1
    disk = lens_blur(spot, 6, seeded())[0]
    assert disk[20, 26] > 0 and disk[20, 27] == 0 and torch.allclose(disk, disk.T) and torch.allclose(disk, disk.flip(0))


def test_sharpening_acts_and_the_official_one_ruins_alike(picture):
    ours = [distort(picture, "high_sharpen", level, seeded()) for level in (1, 5)]
    theirs = [distort(picture, "high_sharpen", level, seeded(), variant="official") for level in (1, 5)]
    assert (ours[0] - ours[1]).abs().mean() > 0.01
    assert (ours[0] - picture).abs().mean() < 0.1 < (theirs[0] - picture).abs().mean()
    assert (theirs[0] - theirs[1]).abs().mean() < 0.05
    edges = [each.diff(dim=-1).abs().mean() for each in (picture, *ours)]
    assert edges[0] < edges[1] < edges[2]


def test_colours_are_converted_as_elsewhere():
    rgb = torch.rand(3, 4, 5)
    hsv = rgb_to_hsv(rgb)
    for y, x in ((0, 0), (3, 4), (1, 2)):
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb[:, y, x].tolist())
        assert hsv[:, y, x].tolist() == pytest.approx([6 * hue, saturation, value], abs=1e-5)
    torch.testing.assert_close(hsv_to_rgb(hsv), rgb, atol=1e-5, rtol=0)
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(rgb)), rgb, atol=1e-4, rtol=0)
    known = {(1.0, 0.0, 0.0): (53.24, 80.09, 67.20), (1.0, 1.0, 1.0): (100.0, 0.0, 0.0), (0.0, 0.0, 1.0): (32.30, 79.19, -107.86)}
    for colour, lab in known.items():
        found = rgb_to_lab(torch.tensor(colour)[:, None, None])[:, 0, 0]
        assert found.tolist() == pytest.approx(lab, abs=0.05)


def test_translation_mirrors_what_comes_in():
    row = torch.arange(5.0)[None, None]
    assert translate(row, 0, 2)[0, 0].tolist() == [1, 0, 0, 1, 2]
    assert translate(row, 0, -1)[0, 0].tolist() == [1, 2, 3, 4, 4]


def test_colour_shift_moves_green_at_edges_only(picture):
    out = distort(picture, "colour_shift", 5, seeded())
    assert torch.equal(out[0], picture[0]) and torch.equal(out[2], picture[2]) and not torch.equal(out[1], picture[1])


def test_unknown_names_and_levels():
    with pytest.raises(UserError, match=r"unknown distortion 'gausian_blur'.*gaussian_blur"):
        distort(torch.rand(3, 8, 8), "gausian_blur", 1, seeded())
    with pytest.raises(UserError, match="level 6"):
        distort(torch.rand(3, 8, 8), "jpeg", 6, seeded())
