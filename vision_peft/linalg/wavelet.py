"""One level of the orthonormal periodised wavelet transform, for the wavelets of Daubechies with up to four vanishing moments.

The filters are computed, not tabulated: the half-band polynomial of N vanishing moments is factorised, `dbN` takes its roots inside
the unit circle, `symN` the choice whose filter is nearest to a symmetric one.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from math import comb

import numpy as np
import torch
from torch import Tensor

from vision_peft.errors import UserError, nearest

WAVELETS = ("haar", "db1", "db2", "db3", "db4", "sym2", "sym3", "sym4")


def require_wavelet(wavelet: str, key: str) -> str:
    """The name; UserError with the nearest ones where it is not known."""
    if wavelet not in WAVELETS:
        raise UserError(f"{key}: unknown wavelet {wavelet!r}{nearest(wavelet, WAVELETS)} (known: {', '.join(WAVELETS)})")
    return wavelet


@lru_cache
def filters(wavelet: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Low-pass h and high-pass g, g[k] = (-1)^k h[L - 1 - k], both of length L = 2 N and of norm 1."""
    moments = 1 if require_wavelet(wavelet, "wavelet") == "haar" else int(wavelet[-1])
    h = _low_pass(moments, symmetric=wavelet.startswith("sym"))
    return tuple(h.tolist()), tuple((h[::-1] * (-1.0) ** np.arange(2 * moments)).tolist())


def dwt(x: Tensor, wavelet: str) -> tuple[Tensor, Tensor]:
    """(low, high), each (..., n / 2), of x (..., n), n even: low[i] = sum_k h[k] x[(2 i + k) mod n], high likewise with g."""
    even, odd = x[..., 0::2], x[..., 1::2]
    low, high = filters(wavelet)
    return tuple(  # the filter's taps in pairs; shifts wrap around as often as a filter longer than x needs
        sum(taps[k] * even.roll(-k // 2, -1) + taps[k + 1] * odd.roll(-k // 2, -1) for k in range(0, len(taps), 2)) for taps in (low, high)
    )


def idwt(low: Tensor | None, high: Tensor | None, wavelet: str) -> Tensor:
    """x (..., n) of its two halves (..., n / 2): the inverse, and the transpose, of dwt. None stands for a half of zeros."""
    halves = [(taps, half) for taps, half in zip(filters(wavelet), (low, high)) if half is not None]
    even = sum(taps[k] * half.roll(k // 2, -1) for taps, half in halves for k in range(0, len(taps), 2))
    odd = sum(taps[k + 1] * half.roll(k // 2, -1) for taps, half in halves for k in range(0, len(taps), 2))
    return torch.stack([even, odd], dim=-1).flatten(-2)


def dwt_matrix(size: int, wavelet: str) -> Tensor:
    """H (size, size) in float64, size even: the low-pass rows, then the high-pass rows; H H^T = I, H x stacks both halves of dwt(x)."""
    if size % 2:
        raise ValueError(f"a periodised wavelet transform needs an even size, not {size}")
    return torch.cat(dwt(torch.eye(size, dtype=torch.float64), wavelet), dim=-1).mT.contiguous()


def _low_pass(moments: int, symmetric: bool) -> np.ndarray:
    """Taps of ((1 + z)/2)^N Q(z), Q Q~ = sum_k C(N-1+k, k) y^k in y = (2 - z - 1/z) / 4."""
    roots_y = np.roots([comb(moments - 1 + k, k) for k in reversed(range(moments))])
    pairs = []  # (inside, outside) the unit circle, conjugates together
    for y in roots_y[roots_y.imag >= -1e-12]:
        z = np.roots([1, 4 * y - 2, 1])
        pairs.append([[each, each.conj()] if abs(y.imag) > 1e-12 else [each.real] for each in z[np.argsort(abs(z))]])
    if not symmetric:
        return _taps(moments, [root for inside, _ in pairs for root in inside])
    found = [_taps(moments, [root for group in choice for root in group]) for choice in itertools.product(*pairs)]
    # every filter is there with its reversal, which is as symmetric: the one with its peak in the left half is taken
    return min((h for h in found if np.abs(h).argmax() < moments), key=_asymmetry)


def _taps(moments: int, roots: list[complex]) -> np.ndarray:
    h = np.real(np.poly([-1.0] * moments + roots))
    return h * (2**0.5 / h.sum())


def _asymmetry(h: np.ndarray) -> float:
    """How far the phase is from a straight line, over the frequencies that pass."""
    frequency = np.linspace(0.05, 0.7, 64) * np.pi
    phase = np.unwrap(np.angle(np.exp(-1j * np.outer(frequency, np.arange(len(h)))) @ h))
    return float(((phase - np.polyval(np.polyfit(frequency, phase, 1), frequency)) ** 2).sum())
