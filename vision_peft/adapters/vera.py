"""VeRA: all layers share one pair of frozen random matrices, and each trains two vectors that scale them.

    W' = W + diag(b) B diag(d) A        A (r, n), B (m, r) random;  b (m,), d (r,) trained

A and B are the first n columns and the first m rows of one pair, as wide as the widest and as tall as the tallest of the adapted
layers. The entries of the pair are uniform of variance 2 / fan-in (Kaiming's rule), drawn from the run's seed; the pair is not
saved but drawn again on load. Start: b = 0, d = 0.1, so W' = W. Trained: m + r numbers a weight. There is no alpha / r.

Source: Kopiczko, Blankevoort and Asano, "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024; checked against the layer of
huggingface/peft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_dropout
from vision_peft.adapters._random_bases import Basis, RandomBases, require_positive
from vision_peft.engine.adapter import Adapter, Evidence, Factored, Method
from vision_peft.engine.site import Site


class VeRAAdapter(Adapter):
    shared: RandomBases  # A (r, largest n), B (largest m, r)

    def __init__(self, site: Site, method: VeRA, shared: RandomBases) -> None:
        super().__init__()
        self.d_initial, self.dropout = method.d_initial, method.dropout
        object.__setattr__(self, "shared", shared)  # no child: saved and moved once, not with every adapter
        self.b = nn.Parameter(torch.zeros(site.matrix_shape[0]))
        self.d = nn.Parameter(torch.zeros(method.rank))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.b.zero_()
        self.d.fill_(self.d_initial)

    def _factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """(m, r), (r, n). Both vectors go into the left one, so that the right one needs no gradient."""
        return self.b[:, None] * self.shared.B[: W.shape[0]] * self.d, self.shared.A[:, : W.shape[1]]

    def weight(self, W: Tensor) -> Tensor:
        return torch.addmm(W, *self._factors(W))

    def factored(self, W: Tensor) -> Factored | None:
        # thin products with every token, r (m + n) each, beat one dense weight gradient, m n, only while r is small
        if self.dropout > 0 or len(self.d) * sum(W.shape) <= W.numel():
            return Factored(*self._factors(W), None, self.dropout)
        return None


class VeRA(Method):
    """Vector-based random matrix adaptation.

    Args:
        rank: r, of the shared pair; may exceed the layers' widths.
        d_initial: start of d.
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
    """

    kind = "random-basis"
    low_rank = False  # of rank r, but r is large here and each layer would be exported with a copy of the shared pair
    formula = "m + r"
    advice = "the smallest file that still has a vector for every layer; take a learning rate ten times LoRA's."

    def __init__(self, rank: int = 256, d_initial: float = 0.1, dropout: float = 0.0) -> None:
        self.rank, self.d_initial, self.dropout = require_positive("rank", rank), d_initial, require_dropout(dropout)

    def shared(self, sites: Sequence[Site]) -> RandomBases:
        out, columns = (max(site.matrix_shape[side] for site in sites) for side in (0, 1))
        std_a, std_b = math.sqrt(2 / columns), math.sqrt(2 / self.rank)
        return RandomBases({"A": Basis((self.rank, columns), std_a), "B": Basis((out, self.rank), std_b)})

    def adapter(self, site: Site, shared: RandomBases) -> VeRAAdapter:
        return VeRAAdapter(site, self, shared)

    def count(self, site: Site) -> int:
        return site.matrix_shape[0] + self.rank
