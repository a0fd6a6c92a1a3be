"""WaRA over patch tokens: a low-rank branch whose features are seen as an image, and whose wavelet subbands have trained gains.

    y = W x + b + s B IDWT( g_band * DWT(A x) ),    band = LL, LH, HL, HH of the h x w grid of patch tokens

A (r, n), B (m, r), g (4,); s = alpha / r. The transform is one level of the orthonormal periodised 2-D wavelet transform over the
grid, for every feature by itself; it commutes with A and B, so it runs on the r features between them, at the price of a few sums.
First letter of a band: rows of the grid, second: columns. An odd side is lengthened by a row or column of zeros, dropped afterwards.
Tokens before the grid (class token, registers) take the branch without transform, as in LoRA; a single vector is a grid of one.
Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, g = 1, so the layer computes what it did. Trained: r (m + n) + 4 numbers a layer. With all
gains at 1 it is LoRA. A gain acts between tokens, so there is no weight to merge. Gains are not decayed.

Source: a later revision of "WaRA: Wavelet Low Rank Adaptation", arXiv 2506.24092; reconstructed from its abstract. With an adapter that
is shared by all subbands and linear, the transform would cancel: the gains, and the path of the class token, are this project's choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_rank, scale_of
from vision_peft.engine.adapter import Adapter, Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_
from vision_peft.linalg.wavelet import dwt, idwt, require_wavelet


class WaRATokensAdapter(Adapter):
    def __init__(self, site: Site, method: WaRATokens) -> None:
        super().__init__()
        m, n = require_rank(site, method.rank)
        self.name, self.scale, self.wavelet, self.grid = site.name, method.scale, method.wavelet, method.grid
        self.A = nn.Parameter(torch.zeros(method.rank, n))
        self.B = nn.Parameter(torch.zeros(m, method.rank))
        self.gains = nn.Parameter(torch.ones(4))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        kaiming_rows_(self.A, evidence.generator)
        self.B.zero_()
        self.gains.fill_(1.0)

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        low = F.linear(x, self.A.to(x.dtype))  # (..., r)
        if x.dim() < 3:  # no tokens
            mixed = self.mix(low[..., None, None, :])[..., 0, 0, :]
        elif x.dim() == 4:  # already an image, (B, h, w, n)
            mixed = self.mix(low)
        else:
            h, w = self.sides(x.shape[1])
            first, patches = low.split([x.shape[1] - h * w, h * w], dim=1)
            mixed = torch.cat([first, self.mix(patches.unflatten(1, (h, w))).flatten(1, 2).to(first.dtype)], dim=1)
        return F.linear(x, W, b) + self.scale * F.linear(mixed.to(x.dtype), self.B.to(x.dtype))

    def mix(self, image: Tensor) -> Tensor:
        """Subbands of (..., h, w, r) under their gains; computed with the features first, so that rows and columns come last."""
        h, w = image.shape[-3:-1]
        channels = F.pad(image.movedim(-1, -3).float(), (0, w % 2, 0, h % 2))  # (..., r, h, w), sides even
        bands = [half for each in dwt(channels.mT, self.wavelet) for half in dwt(each.mT, self.wavelet)]  # rows, then columns
        LL, LH, HL, HH = (gain * band for gain, band in zip(self.gains, bands))
        whole = idwt(idwt(LL, LH, self.wavelet).mT, idwt(HL, HH, self.wavelet).mT, self.wavelet).mT
        return whole[..., :h, :w].movedim(-3, -1)

    def sides(self, tokens: int) -> tuple[int, int]:
        """(h, w) of the patches among so many tokens."""
        if self.grid is not None:
            h, w = self.grid
            if h * w > tokens:
                raise UserError(f"adapter.method.grid: {h} x {w} patches are more than the {tokens} tokens of {self.name}")
            return h, w
        for patches in (tokens, tokens - 1):  # without and with a class token
            side = math.isqrt(patches)
            if side * side == patches and side > 0:
                return side, side
        raise UserError(f"adapter.method.grid: {tokens} tokens of {self.name} are no square, with or without a class token: give [h, w]")


class WaRATokens(Method):
    """Wavelet low-rank adaptation over the grid of patch tokens; for layers that see (batch, tokens, features).

    Args:
        rank: r, 1 to min(m, n).
        alpha: numerator of the scale alpha / r.
        wavelet: haar, db2 to db4, or sym2 to sym4.
        grid: [h, w] of the patches, which are the last h w tokens; null for a square grid after at most one class token.
    """

    kind = "wavelet"
    source = "abstract"
    reads_input = True
    merge = "impossible"
    formula = "r (m + n) + 4"
    advice = "features are spatial and subbands should have gains of their own; cannot be merged."
    tiny = {"grid": [1, 2]}

    def __init__(self, rank: int = 8, alpha: float = 8.0, wavelet: str = "haar", grid: list[int] | None = None) -> None:
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise UserError(f"adapter.method.grid: {grid} is not two positive numbers, height and width")
        self.rank, self.alpha, self.grid = rank, alpha, grid
        self.wavelet, self.scale = require_wavelet(wavelet, "adapter.method.wavelet"), scale_of(alpha, rank, "rank")

    def adapter(self, site: Site, shared: nn.Module | None) -> WaRATokensAdapter:
        return WaRATokensAdapter(site, self)

    def param_groups(self, adapters: Mapping[str, WaRATokensAdapter], shared: nn.Module | None, lr: float) -> list[dict[str, Any]]:
        factors = [factor for adapter in adapters.values() for factor in (adapter.A, adapter.B)]
        gains = [adapter.gains for adapter in adapters.values()]
        return [{"params": factors, "name": "factors"}, {"params": gains, "weight_decay": 0.0, "name": "gains"}]

    def count(self, site: Site) -> int:
        return self.rank * sum(site.matrix_shape) + 4
