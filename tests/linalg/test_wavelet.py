"""The filters of Daubechies by their defining properties and published values, and the transform by its definition."""

from __future__ import annotations

import math

import pytest
import torch

from vision_peft.errors import UserError
from vision_peft.linalg.wavelet import WAVELETS, dwt, dwt_matrix, filters, idwt, require_wavelet

EXACT = {"rtol": 0, "atol": 1e-12}
SIZES = [2, 4, 6, 10, 64]


def moments(wavelet: str) -> int:
    return 1 if wavelet == "haar" else int(wavelet[-1])


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters_are_orthonormal_to_their_even_shifts_and_have_their_vanishing_moments(wavelet):
    h, g = (torch.tensor(taps, dtype=torch.float64) for taps in filters(wavelet))
    N = moments(wavelet)
    assert len(h) == len(g) == 2 * N
    for shift in range(0, 2 * N, 2):
        wanted = float(shift == 0)
        assert float(h[shift:] @ h[: 2 * N - shift]) == pytest.approx(wanted, abs=1e-11)
        assert float(g[shift:] @ g[: 2 * N - shift]) == pytest.approx(wanted, abs=1e-11)
        assert float(h[shift:] @ g[: 2 * N - shift]) == pytest.approx(0, abs=1e-11)
    assert float(h.sum()) == pytest.approx(math.sqrt(2), abs=1e-12)
    for power in range(N):
        assert float(g @ torch.arange(2 * N).double() ** power) == pytest.approx(0, abs=1e-8)


def test_published_values():
    s = math.sqrt(3)
    assert filters("haar") == filters("db1")
    assert filters("db2")[0] == pytest.approx([(1 + s) / 32**0.5, (3 + s) / 32**0.5, (3 - s) / 32**0.5, (1 - s) / 32**0.5], abs=1e-12)
    assert filters("db4")[0][:3] == pytest.approx([0.2303778133088964, 0.7148465705529154, 0.6308807679298587], abs=1e-10)
    assert filters("sym4")[0] == pytest.approx(
        [-0.0757657148, -0.0296355276, 0.4976186676, 0.8037387518, 0.2978577956, -0.0992195436, -0.0126039673, 0.0322231006], abs=1e-9
    )
    assert filters("sym3") == filters("db3")  # one root, no choice
    assert filters("sym4") != filters("db4")


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("size", SIZES)
def test_matrix_is_orthonormal_also_where_the_filter_is_longer_than_the_signal(wavelet, size):
    H = dwt_matrix(size, wavelet)
    torch.testing.assert_close(H @ H.mT, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
@pytest.mark.parametrize("size", SIZES)
def test_matrix_entry_by_entry(wavelet, size):
    expected = torch.zeros(size, size, dtype=torch.float64)
    for half, taps in enumerate(filters(wavelet)):
        for i in range(size // 2):
            for k, tap in enumerate(taps):
                expected[half * size // 2 + i, (2 * i + k) % size] += tap
    torch.testing.assert_close(dwt_matrix(size, wavelet), expected, **EXACT)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_transform_and_inverse(wavelet):
    x = torch.randn(3, 10, dtype=torch.float64)
    low, high = dwt(x, wavelet)
    torch.testing.assert_close(torch.cat([low, high], 1), x @ dwt_matrix(10, wavelet).mT, **EXACT)
    torch.testing.assert_close(idwt(low, high, wavelet), x, rtol=0, atol=1e-11)
    torch.testing.assert_close(idwt(low, None, wavelet) + idwt(None, high, wavelet), idwt(low, high, wavelet), **EXACT)


def test_haar_by_hand():
    low, high = dwt(torch.tensor([1.0, 3.0, 2.0, 2.0]), "haar")
    torch.testing.assert_close(low, torch.tensor([4.0, 4.0]) / math.sqrt(2))
    torch.testing.assert_close(high, torch.tensor([-2.0, 0.0]) / math.sqrt(2))


def test_a_constant_has_no_high_band():
    assert dwt(torch.ones(16, dtype=torch.float64), "db3")[1].abs().max() < 1e-12


def test_refused():
    with pytest.raises(UserError, match=r"adapter.method.wavelet: unknown wavelet 'harr'; did you mean haar"):
        require_wavelet("harr", "adapter.method.wavelet")
    with pytest.raises(UserError, match="db5"):
        filters("db5")
    with pytest.raises(ValueError, match="even size, not 7"):
        dwt_matrix(7, "haar")
