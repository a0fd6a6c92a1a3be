"""BRISQUE's statistics: the fits recover what samples were drawn from, and pictures give what a plain computation gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from scipy.optimize import brentq
from scipy.special import gamma
from sklearn.datasets import load_sample_image

from vision_peft.quality.natural_scenes import NaturalScenes, fit_asymmetric, fit_symmetric

COUNT = 200_000


def smooth_picture(seed: int, height: int = 64, width: int = 80, deviation: float = 1.5) -> torch.Tensor:
    """(1, 3, H, W) of 256 levels, whose channels fill [0, 1]."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(3, height, width)), (0, deviation, deviation))
    low, high = noise.min((1, 2), keepdims=True), noise.max((1, 2), keepdims=True)
    return torch.from_numpy(np.round(255 * (noise - low) / (high - low)) / 255).float()[None]


@pytest.fixture(scope="module", params=["china.jpg", "flower.jpg"])
def photograph(request) -> np.ndarray:
    """(3, 427, 640) in [0, 1]."""
    return load_sample_image(request.param).transpose(2, 0, 1) / 255.0


@pytest.mark.parametrize("draw, shape, variance", [("normal", 2, 9), ("laplace", 1, 18), ("uniform", 10, 3)])
def test_symmetric_fit_recovers_shape_and_variance(draw, shape, variance):
    rng = np.random.default_rng(0)
    samples = rng.uniform(-3, 3, COUNT) if draw == "uniform" else getattr(rng, draw)(scale=3, size=COUNT)
    found = fit_symmetric(torch.from_numpy(samples)[None])[0]
    assert found.tolist() == pytest.approx([shape, variance], rel=0.03)  # a uniform density is the grid's end


@pytest.mark.parametrize("shape, left, right", [(0.8, 1.0, 2.0), (1.5, 0.7, 0.3), (2.0, 1.0, 1.0), (3.0, 0.5, 2.0)])
def test_asymmetric_fit_recovers_its_parameters(shape, left, right):
    """Scales b_l and b_r: a half is chosen with probability b / (b_l + b_r), and |x| / b is half a generalised normal variable."""
    rng = np.random.default_rng(1)
    sizes = np.abs(stats.gennorm.rvs(shape, size=COUNT, random_state=rng))
    samples = np.where(rng.random(COUNT) < left / (left + right), -left * sizes, right * sizes)
    found = fit_asymmetric(torch.from_numpy(samples)[None])[0].tolist()
    unit = gamma(3 / shape) / gamma(1 / shape)
    assert [found[0], *found[2:]] == pytest.approx([shape, left**2 * unit, right**2 * unit], rel=0.03)
    assert found[1] == pytest.approx((right - left) * gamma(2 / shape) / gamma(1 / shape), abs=0.02)
    assert found[1] == pytest.approx(samples.mean(), abs=0.02), "the mean is the density's own"


def plainly(picture: np.ndarray) -> list[float]:
    """18 features of (3, H, W) on 0..255: a 7 x 7 window with zeros outside, neighbours around the border, shapes by bisection."""
    grey = 0.299 * picture[0] + 0.587 * picture[1] + 0.114 * picture[2]
    rows, columns = np.mgrid[-3:4, -3:4]
    window = np.exp(-(rows**2 + columns**2) / (2 * (7 / 6) ** 2))
    window /= window.sum()
    mean = ndimage.correlate(grey, window, mode="constant")
    contrast = (grey - mean) / (np.sqrt(np.abs(ndimage.correlate(grey * grey, window, mode="constant") - mean**2)) + 1)

    def solve(target: float) -> float:
        return brentq(lambda shape: gamma(1 / shape) * gamma(3 / shape) / gamma(2 / shape) ** 2 - target, 0.2, 10, xtol=1e-12)

    found = [solve((contrast**2).mean() / np.abs(contrast).mean() ** 2), (contrast**2).mean()]
    height, width = contrast.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        products = np.array([contrast[y, x] * contrast[(y + down) % height, (x + right) % width] for y, x in places])
        left_variance, right_variance = (products[products < 0] ** 2).mean(), (products[products > 0] ** 2).mean()
        g = np.sqrt(left_variance / right_variance)
        ratio = np.abs(products).mean() ** 2 / (products**2).mean() * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
        shape = solve(1 / ratio)
        scales = np.sqrt(np.array([left_variance, right_variance]) * gamma(1 / shape) / gamma(3 / shape))
        found += [shape, (scales[1] - scales[0]) * gamma(2 / shape) / gamma(1 / shape), left_variance, right_variance]
    return found


@pytest.mark.parametrize("deviation", [0.7, 1.5, 3.0])
def test_features_are_those_of_a_plain_computation(deviation):
    picture = smooth_picture(2, 40, 53, deviation)
    found = NaturalScenes()(picture)
    assert found.shape == (1, 18) and found.dtype == torch.float32
    np.testing.assert_allclose(found[0], plainly(picture[0].double().numpy() * 255), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_a_constant_picture_is_finite(level):
    assert NaturalScenes()(torch.full((2, 3, 32, 40), level)).isfinite().all()


def test_black_is_the_least_shape_and_no_variance():
    assert NaturalScenes()(torch.zeros(1, 3, 32, 32))[0].tolist() == pytest.approx([0.2, 0] + [0.2, 0, 0, 0] * 4)


def test_signs_of_a_flat_area_are_not_drawn_by_round_off():
    """Half of the picture is flat, at levels whose window sums round differently: only the zeros outside tell them apart."""
    picture = smooth_picture(3)
    variances = []
    for level in (77, 78, 79):
        picture[..., 40:] = level / 255
        inner = NaturalScenes()(picture)[0]
        variances.append(inner[[4, 5, 8, 9]])
    assert (torch.stack(variances).std(0) / variances[0] < 0.02).all()


def test_a_batch_is_its_pictures():
    expert, pictures = NaturalScenes(), torch.cat([smooth_picture(4), smooth_picture(5, deviation=4)])
    torch.testing.assert_close(expert(pictures), torch.cat([expert(pictures[:1]), expert(pictures[1:])]), rtol=1e-6, atol=1e-7)


def test_noise_raises_the_shape_and_blur_lowers_it(photograph):
    noise = np.random.default_rng(0).normal(size=photograph.shape)
    blurred = [ndimage.gaussian_filter(photograph, (0, deviation, deviation)) for deviation in (2, 1, 0.7)]
    noisy = [np.clip(photograph + level * noise, 0, 1) for level in (0.02, 0.05, 0.1)]
    shapes = [NaturalScenes()(torch.from_numpy(each).float()[None])[0, 0].item() for each in (*blurred, photograph, *noisy)]
    assert (np.diff(shapes) > 0.1).all(), shapes
    assert shapes[3] < 2 < shapes[4], "a photograph is more peaked than a Gaussian, a noisy one less: its own pixel is in each window"


def test_it_describes_itself():
    expert = NaturalScenes()
    assert expert.describe() == {"name": "classical:brisque", "width": 18, "fingerprint": "brisque-1"}
