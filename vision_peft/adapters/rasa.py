"""RaSA: every layer gives k of its r ranks into a pool that all layers of its type use, each with weights of its own.

    W' = W + [B_l, B_s] diag(e_l) [A_l; A_s]        A_l (r - k, n), B_l (m, r - k) of the layer,  A_s (L k, n), B_s (m, L k) of the pool

L layers have the same type: the same name but for the numbers in it, such as `vision.#.attn.q`. A layer thereby works with r - k + L k
ranks for the price of r. Where layers of one type differ in size, the pool has the largest and each takes its first columns and rows.
Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0; e = alpha / (2 (r - k)) for the layer's own ranks and alpha / (2 L k) for the pool's, half of
the scale each; so W' = W. Trained: (r - k)(m + n + 1) numbers a weight, and for each type L k (m + n) in the pool and L L k weights on it.

Source: He et al., "RaSA: Rank-Sharing Low-Rank Adaptation", ICLR 2025; read in the code of hhnqqq/MyTransformers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_dropout, require_rank, scale_of
from vision_peft.adapters._shared_factors import SharedFactors
from vision_peft.engine.adapter import Evidence, Factored, FactoredAdapter, Method, Shared
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_


class RankPool(SharedFactors):
    """The shared ranks of the layers of one type, and how much each layer takes of each."""

    def __init__(self, sites: Sequence[Site], method: RaSA) -> None:
        rank = len(sites) * method.shared_rank
        super().__init__(sites, rank)
        self.start = method.alpha / (2 * rank)
        self.row = {site.name: index for index, site in enumerate(sites)}
        self.e = nn.Parameter(torch.zeros(len(sites), rank))

    def initialize(self, generator: torch.Generator) -> None:
        super().initialize(generator)
        self.e.fill_(self.start)


class RankPools(Shared):
    def __init__(self, sites: Sequence[Site], method: RaSA) -> None:
        super().__init__()
        types: dict[str, list[Site]] = {}
        for site in sites:
            types.setdefault(layer_type(site), []).append(site)
        self.pools = nn.ModuleDict({name.replace(".", "/"): RankPool(members, method) for name, members in types.items()})

    def initialize(self, generator: torch.Generator) -> None:
        for pool in self.pools.values():
            pool.initialize(generator)

    def of(self, site: Site) -> RankPool:
        return self.pools[layer_type(site).replace(".", "/")]


class RaSAAdapter(FactoredAdapter):
    pool: RankPool

    def __init__(self, site: Site, method: RaSA, pool: RankPool) -> None:
        super().__init__()
        own = method.rank - method.shared_rank
        out, columns = require_rank(site, own)
        self.dropout, self.start, self.row = method.dropout, method.alpha / (2 * own), pool.row[site.name]
        object.__setattr__(self, "pool", pool)  # no child: saved and trained once, not with every adapter
        self.A = nn.Parameter(torch.zeros(own, columns))
        self.B = nn.Parameter(torch.zeros(out, own))
        self.e = nn.Parameter(torch.zeros(own))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        kaiming_rows_(self.A, evidence.generator)
        self.B.zero_()
        self.e.fill_(self.start)

    def factored(self, W: Tensor) -> Factored:
        out, columns = W.shape
        B = torch.cat([self.B * self.e, self.pool.up(out) * self.pool.e[self.row]], dim=1)
        return Factored(B, torch.cat([self.A, self.pool.down(columns)]), None, self.dropout)


class RaSA(Method):
    """Rank-sharing low-rank adaptation.

    Args:
        rank: r, the ranks that a layer pays for.
        shared_rank: k of them that go into the pool, 1 to r - 1.
        alpha: numerator of the scale; half of it for the layer's own ranks, half for the pool's.
        dropout: as LoRA.
    """

    low_rank = True
    kind = "low-rank"
    formula = "(r - k)(m + n + 1), beside the pools"
    advice = "layers are alike: ranks are shared across them."

    def __init__(self, rank: int = 8, shared_rank: int = 1, alpha: float = 8.0, dropout: float = 0.0) -> None:
        scale_of(alpha, rank, "rank")  # refuses a rank below 1
        if not 1 <= shared_rank < rank:
            raise UserError(f"adapter.method.shared_rank: {shared_rank} is not between 1 and rank - 1 = {rank - 1}")
        self.rank, self.shared_rank, self.alpha, self.dropout = rank, shared_rank, alpha, require_dropout(dropout)

    def shared(self, sites: Sequence[Site]) -> RankPools:
        return RankPools(sites, self)

    def adapter(self, site: Site, shared: RankPools) -> RaSAAdapter:
        return RaSAAdapter(site, self, shared.of(site))

    def count(self, site: Site) -> int:
        return (self.rank - self.shared_rank) * (sum(site.matrix_shape) + 1)


def layer_type(site: Site) -> str:
    """The site's name with # for its numbers: what the same layer of all blocks has in common."""
    return ".".join("#" if part.isdigit() else part for part in site.name.split("."))
