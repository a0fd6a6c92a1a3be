"""WaRA: low-rank factors act on the wavelet coefficients of the update instead of its entries.

    W' = W + s H_m^T K H_n,    H: one level of the orthonormal periodised wavelet transform, low-pass rows L over high-pass rows G

    shared    K = [[B A, 0], [0, B A]]              W' = W + s (L_m^T B A L_n + G_m^T B A G_n)
    per_band  K = [[P_LL, P_HL], [P_LH, P_HH]],     P = B A of its own for every band; first letter: the input's half, second: the output's
    core      K = [[U R V^T, 0], [0, U R V^T]],     U, V: leading singular vectors of the low-low block of H_m W H_n^T

A (r, n / 2), B (m / 2, r), R (r, r), s = alpha / r. Where a side is odd, one zero is appended before the transform and dropped after
it, so halves are rounded up. Start: A ~ U(-1/sqrt(n/2), 1/sqrt(n/2)), B = 0, R = 0, so W' = W. Frozen: W, H, and in `core` U and V,
which are recomputed from W on load. Trained: r (m + n) / 2 numbers a weight, half of LoRA's (shared); 2 r (m + n) with all four bands
(per_band); r^2 (core). The update has rank 2 r, or r times the number of bands. `shared` equals the paper's procedure, which
transforms the layer's input over features and tokens, adapts all subbands by one pair and transforms back: the transform over the
tokens cancels. With haar it is a LoRA whose entries are repeated on 2 x 2 diagonal blocks, B A (x) I_2.

Source: "WaRA: Wavelet Low Rank Adaptation", arXiv 2506.24092; reconstructed from the abstract and the caption of the overview figure:
wavelet, boundary rule, scale and start are this project's choice, `core` its reading of the Tiny variant of a later revision.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import scale_of
from vision_peft.engine.adapter import Evidence, Factored, FactoredAdapter, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_
from vision_peft.linalg.svd import basis_mark
from vision_peft.linalg.svd_cache import cached_svd
from vision_peft.linalg.wavelet import dwt, idwt, require_wavelet

Mode = Literal["shared", "per_band", "core"]
BANDS = ("LL", "LH", "HL", "HH")


class _WaveletAdapter(FactoredAdapter):
    """What the modes have in common: from the halves of either side back to the whole."""

    def __init__(self, site: Site, method: WaRA) -> None:
        super().__init__()
        self.shape, self.scale, self.wavelet = site.matrix_shape, method.scale, method.wavelet
        self.halves = method.halves(site)

    def rows(self, A: Tensor, half: str) -> Tensor:
        """A L_n or A G_n (r, n)."""
        return self._whole(A, half)[:, : self.shape[1]]

    def columns(self, B: Tensor, half: str) -> Tensor:
        """L_m^T B or G_m^T B (m, r)."""
        return self._whole(B.mT, half)[:, : self.shape[0]].mT

    def both(self, B: Tensor, A: Tensor) -> Factored:
        """L^T B A L + G^T B A G."""
        left = torch.cat([self.columns(B, "L"), self.columns(B, "H")], dim=1)  # (m, 2 r)
        return Factored(self.scale * left, torch.cat([self.rows(A, "L"), self.rows(A, "H")]))

    def _whole(self, values: Tensor, half: str) -> Tensor:
        return idwt(values, None, self.wavelet) if half == "L" else idwt(None, values, self.wavelet)


class SharedBandsAdapter(_WaveletAdapter):
    def __init__(self, site: Site, method: WaRA) -> None:
        super().__init__(site, method)
        self.A = nn.Parameter(torch.zeros(method.rank, self.halves[1]))
        self.B = nn.Parameter(torch.zeros(self.halves[0], method.rank))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        kaiming_rows_(self.A, evidence.generator)
        self.B.zero_()

    def factored(self, W: Tensor) -> Factored:
        return self.both(self.B, self.A)


class PerBandAdapter(_WaveletAdapter):
    def __init__(self, site: Site, method: WaRA) -> None:
        super().__init__(site, method)
        self.A = nn.ParameterDict({band: torch.zeros(method.rank, self.halves[1]) for band in method.bands or BANDS})
        self.B = nn.ParameterDict({band: torch.zeros(self.halves[0], method.rank) for band in method.bands or BANDS})

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        for band in self.A:
            kaiming_rows_(self.A[band], evidence.generator)
            self.B[band].zero_()

    def factored(self, W: Tensor) -> Factored:
        left = torch.cat([self.columns(B, band[1]) for band, B in self.B.items()], dim=1)  # (m, bands r)
        return Factored(self.scale * left, torch.cat([self.rows(A, band[0]) for band, A in self.A.items()]))


class CoreAdapter(_WaveletAdapter):
    U: Tensor  # (m / 2, r)
    Vh: Tensor  # (r, n / 2)

    def __init__(self, site: Site, method: WaRA) -> None:
        super().__init__(site, method)
        self.R = nn.Parameter(torch.zeros(method.rank, method.rank))
        self.register_buffer("U", None, persistent=False)
        self.register_buffer("Vh", None, persistent=False)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        padded = nn.functional.pad(W, (0, W.shape[1] % 2, 0, W.shape[0] % 2))
        half, _ = dwt(padded, self.wavelet)  # low-pass of every row, (m, n / 2)
        low, _ = dwt(half.mT.contiguous(), self.wavelet)  # (n / 2, m / 2)
        U, _, Vh = cached_svd(low.mT.contiguous())
        self.U, self.Vh = U[:, : len(self.R)].contiguous(), Vh[: len(self.R)].contiguous()
        self.R.zero_()

    def factored(self, W: Tensor) -> Factored:
        return self.both(self.U @ self.R, self.Vh)

    def fingerprint(self) -> Tensor:
        return basis_mark(self.U, self.Vh)


class WaRA(Method):
    """Wavelet low-rank adaptation.

    Args:
        rank: r, 1 to half of the shorter side.
        alpha: numerator of the scale alpha / r.
        mode: `shared`, `per_band` or `core`.
        wavelet: haar, db2 to db4, or sym2 to sym4.
        bands: which of LL, LH, HL, HH `per_band` trains; null for all.
    """

    low_rank = True
    kind = "wavelet"
    source = "abstract"
    formula = "r (m + n) / 2; a pair for every band, or r^2"
    advice = "half of LoRA's numbers at equal rank."

    def __init__(
        self, rank: int = 8, alpha: float = 8.0, mode: Mode = "shared", wavelet: str = "haar", bands: list[str] | None = None
    ) -> None:
        if mode not in _ADAPTERS:
            raise UserError(f"adapter.method.mode: {mode!r} is not one of {', '.join(_ADAPTERS)} (over patch tokens: WaRATokens)")
        if bands is not None and mode != "per_band":
            raise UserError(f"adapter.method.bands: only mode per_band has bands to choose, not {mode}")
        if bands is not None and (not bands or not {*bands} <= {*BANDS} or len({*bands}) < len(bands)):
            raise UserError(f"adapter.method.bands: {bands} is not a choice of {', '.join(BANDS)}, each once")
        self.rank, self.alpha, self.mode, self.wavelet = rank, alpha, mode, require_wavelet(wavelet, "adapter.method.wavelet")
        self.bands = bands
        self.scale = scale_of(alpha, rank, "rank")

    def halves(self, site: Site) -> tuple[int, int]:
        """(m / 2, n / 2), rounded up; UserError where the rank does not fit them."""
        m, n = site.matrix_shape
        halves = (m + 1) // 2, (n + 1) // 2
        if self.rank > min(halves):
            raise UserError(f"adapter.method.rank: {self.rank} does not fit {site.name}, whose {m} x {n} matrix has halves {halves}")
        return halves

    def adapter(self, site: Site, shared: nn.Module | None) -> _WaveletAdapter:
        return _ADAPTERS[self.mode](site, self)

    def count(self, site: Site) -> int:
        if self.mode == "core":
            return self.rank**2
        pairs = len(self.bands or BANDS) if self.mode == "per_band" else 1
        return pairs * self.rank * sum(self.halves(site))


_ADAPTERS = {"shared": SharedBandsAdapter, "per_band": PerBandAdapter, "core": CoreAdapter}
