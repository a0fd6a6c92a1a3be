"""NOLA: the factors of a low-rank update are mixtures of many frozen random matrices, and only the mixing weights are trained.

    W' = W + s B A,     A = A_0 + sum_i alpha_i A_i,  B = sum_j beta_j B_j,     i, j = 1 ... k,  s = (scale) alpha / r

A_i (r, n), B_j (m, r), A_0 (r, n): random, frozen. alpha (k,), beta (k,): trained, so 2 k numbers a weight whatever m, n and r are.

`variant: language` (the paper's form): A_i, B_j ~ U(-1, 1) / sqrt(k), A_0 ~ U(-1/sqrt(n), 1/sqrt(n)); start alpha = beta = 0, so W' = W,
and beta has a gradient at once because A_0 is there.
`variant: vision` (the authors' image code, with rank 1, scale 1 / r and k = 1024): no A_0; A_i uniform within 1 / sqrt(n r), B_j within
1 / sqrt(r m); start alpha = beta = 1 / k, a small change of W already.

Layers with the same n share their A_i, layers with the same m their B_j, in memory k r (n + m) numbers for each pair of sizes; the
language code draws them anew for every layer. All are drawn from the run's seed and again on load; a file holds 2 k numbers a weight.

Source: Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random Basis", ICLR 2024 (code: UCDvision/NOLA).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._random_bases import Basis, RandomBases, require_positive
from vision_peft.engine.adapter import Evidence, Factored, FactoredAdapter, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_
from vision_peft.linalg.random_bases import mark


class NOLAAdapter(FactoredAdapter):
    shared: RandomBases  # A_<n> (k, r * n) and B_<m> (k, m * r) for every size
    A_0: Tensor | None  # (r, n)

    def __init__(self, site: Site, method: NOLA, shared: RandomBases) -> None:
        super().__init__()
        self.rank, self.scale, self.start = method.rank, method.alpha / method.rank, method.start
        object.__setattr__(self, "shared", shared)  # no child: saved and moved once, not with every adapter
        self.alpha = nn.Parameter(torch.zeros(method.bases))
        self.beta = nn.Parameter(torch.zeros(method.bases))
        offset = torch.zeros(method.rank, site.matrix_shape[1]) if method.variant == "language" else None
        self.register_buffer("A_0", offset, persistent=False)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.alpha.fill_(self.start)
        self.beta.fill_(self.start)
        if self.A_0 is not None:
            kaiming_rows_(self.A_0, evidence.generator)

    def factored(self, W: Tensor) -> Factored:
        out, columns = W.shape
        A = (self.alpha @ self.shared.get_buffer(f"A_{columns}")).view(self.rank, columns)
        B = (self.beta @ self.shared.get_buffer(f"B_{out}")).view(out, self.rank)
        return Factored(self.scale * B, A if self.A_0 is None else A + self.A_0)

    def fingerprint(self) -> Tensor | None:
        return None if self.A_0 is None else mark(self.A_0)


class NOLA(Method):
    """Low-rank adaptation in the span of random bases.

    Args:
        rank: r; may exceed the layers' widths.
        bases: k, of either factor.
        alpha: numerator of the scale; 1 in the image code.
        variant: `language`, the identity at the start, or `vision`.
    """

    low_rank = True
    kind = "random-basis"
    formula = "2 k"
    advice = "a file of a few hundred kilobytes for a large model, whatever the rank."

    def __init__(
        self, rank: int = 8, bases: int = 512, alpha: float = 8.0, variant: Literal["language", "vision"] = "language"
    ) -> None:
        if variant not in ("language", "vision"):
            raise UserError(f"adapter.method.variant: {variant!r} is not one of language, vision")
        self.rank, self.bases = require_positive("rank", rank), require_positive("bases", bases)
        self.alpha, self.variant = alpha, variant
        self.start = 0.0 if variant == "language" else 1 / bases
        self.identity_at_init = variant == "language"  # the one flag that depends on a hyper-parameter

    def shared(self, sites: Sequence[Site]) -> RandomBases:
        sizes = {}
        for letter, side in (("A", 1), ("B", 0)):
            for size in sorted({site.matrix_shape[side] for site in sites}):
                bound = 1 / math.sqrt(self.bases if self.variant == "language" else self.rank * size)
                sizes[f"{letter}_{size}"] = Basis((self.bases, self.rank * size), bound / math.sqrt(3))
        return RandomBases(sizes)

    def adapter(self, site: Site, shared: RandomBases) -> NOLAAdapter:
        return NOLAAdapter(site, self, shared)

    def count(self, site: Site) -> int:
        return 2 * self.bases
