"""LOST: a thin product, with an activation between its factors, plus a few dense columns; both cut out of the weight they replace.

    y = gamma B phi(A x) + (1 - gamma) C x_I + b,    phi = SiLU, or the identity

A (r, n), B (m, r), C (m, k), k = max(1, floor(density n)); I: k input features. With W = U S V^T: A = sqrt(S_r) V_r^T and
B = U_r sqrt(S_r), so B A is the best approximation of rank r; I are the columns with the largest norm in the next `complement_rank`
triplets of W; C = W[:, I], from W itself. Then W is thrown away: a layer for training from scratch, whose start is not W x. Trained:
r (m + n) + m k numbers a weight; biases, which the original trains too, stay frozen. I is stored with the adapter. `start: normal` draws
A and B from N(0, 1 / sqrt(r (m + n))) instead. With SiLU there is no merged weight, and only linear and attention layers can be adapted.

With `pretrained: keep`, y = W x + b + (alpha / r) (branch - branch at the start). Where phi is the identity, the branch at the start is
subtracted as a constant; with SiLU, where no weight could do that, B and C start at zero instead, A and I as above. As published this
form is not the identity at the start (the subtraction is commented out in the program), so both ways are this project's choice.

Source: Li et al., "LOST: Low-rank and Sparse Pre-training for Large Language Models", arXiv 2508.02668; reconstructed from the abstract,
public reviews and two neighbouring programs of the first author, since text and official code could not be read: gamma, density and
complement_rank are those programs' values, not the paper's.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_rank, scale_of
from vision_peft.engine.adapter import Adapter, Evidence, Factored, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.svd import basis_mark
from vision_peft.linalg.svd_cache import cached_svd

Activation = Literal["silu", "identity"]
Start = Literal["svd", "normal"]
Pretrained = Literal["discard", "keep"]


class LOSTAdapter(Adapter):
    columns: Tensor  # (k,) I, ascending

    def __init__(self, site: Site, method: LOST) -> None:
        super().__init__()
        out, width = require_rank(site, method.rank)
        self.gamma, self.start, self.complement_rank = method.gamma, method.start, method.complement_rank
        self.silu, self.keeps, self.scale = method.activation == "silu", method.pretrained == "keep", method.scale
        k = method.columns(site)
        self.A = nn.Parameter(torch.zeros(method.rank, width))
        self.B = nn.Parameter(torch.zeros(out, method.rank))
        self.C = nn.Parameter(torch.zeros(out, k))
        self.register_buffer("columns", torch.zeros(k, dtype=torch.int64))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        U, S, Vh = cached_svd(W)
        r = len(self.A)
        after = slice(r, r + self.complement_rank)
        norms = (S[after, None] * Vh[after]).square().sum(0)  # squared column norms of the complement: U is orthonormal
        self.columns.copy_(norms.argsort(descending=True, stable=True)[: len(self.columns)].sort().values)
        self.C.copy_(W[:, self.columns])
        if self.start == "svd":
            self.A.copy_(S[:r, None].sqrt() * Vh[:r])
            self.B.copy_(U[:, :r] * S[:r].sqrt())
        else:
            for factor in (self.A, self.B):
                drawn = torch.randn(factor.shape, generator=evidence.generator, dtype=torch.float32)
                factor.copy_(drawn * (r * sum(W.shape)) ** -0.25)
        if self.silu and self.keeps:
            self.B.zero_()
            self.C.zero_()

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        low = F.linear(x, self.A.to(x.dtype))
        low = F.silu(low) if self.silu else low
        low = torch.cat([self.gamma * low, ((1 - self.gamma) * x[..., self.columns]).to(low.dtype)], dim=-1)  # (..., r + k)
        thin = torch.cat([self.B, self.C], dim=1).to(x.dtype)
        if self.keeps:
            return F.linear(x, W, b) + self.scale * F.linear(low, thin)
        return F.linear(low, thin, b)


class MergeableLOSTAdapter(LOSTAdapter):
    """Without the activation the layer is a weight."""

    B_0: Tensor  # (m, r) the product at the start, subtracted where the pretrained weight is kept
    A_0: Tensor  # (r, n)

    def __init__(self, site: Site, method: LOST) -> None:
        super().__init__(site, method)
        self.register_buffer("B_0", None, persistent=False)
        self.register_buffer("A_0", None, persistent=False)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        super().initialize(W, evidence)
        if self.keeps:
            self.B_0, self.A_0 = self.B.detach().clone(), self.A.detach().clone()

    def weight(self, W: Tensor) -> Tensor:
        form = self.factored(W)
        if form is not None:
            return torch.addmm(W, form.B, form.A)
        return (self.gamma * self.B @ self.A).index_add(1, self.columns, (1 - self.gamma) * self.C)

    def factored(self, W: Tensor) -> Factored | None:
        if not self.keeps:
            return None  # the weight itself, not its change, is thin: linear()
        chosen = F.one_hot(self.columns, W.shape[1]).to(W.dtype)  # (k, n)
        low, sparse = self.scale * self.gamma, self.scale * (1 - self.gamma)
        B = torch.cat([low * self.B, sparse * (self.C - W[:, self.columns]), -low * self.B_0], dim=1)
        return Factored(B, torch.cat([self.A, chosen, self.A_0]), trained=len(self.A) + len(chosen))

    def fingerprint(self) -> Tensor | None:
        return basis_mark(self.B_0, self.A_0) if self.keeps else None


class LOST(Method):
    """Low-rank and sparse weights taken from the singular value decomposition.

    Args:
        rank: r, 1 to min(m, n).
        density: share of the input features that keep a dense column, in (0, 1]; at least one does.
        gamma: share of the thin branch, in [0, 1]; a constant.
        activation: phi, `silu` or `identity`.
        complement_rank: how many triplets after the first r score the columns.
        start: of A and B, `svd` or `normal`.
        pretrained: `discard` the pretrained weight, as the original, or `keep` it under the trained part.
        alpha: numerator of the scale alpha / r of the branch where the pretrained weight is kept; not used otherwise.
    """

    kind = "pre-training"
    source = "abstract"
    formula = "r (m + n) + m max(1, floor(density n))"
    advice = "training from scratch with low-rank plus channel-sparse weights."
    identity_at_init = False
    reads_input = True  # this and `merge`: with the activation, the default
    merge = "impossible"
    tiny = {"density": 0.25}  # of 10 features, one alone may be a unit of the layer before that is never on

    def __init__(
        self,
        rank: int = 128,
        density: float = 0.01,
        gamma: float = 0.7,
        activation: Activation = "silu",
        complement_rank: int = 256,
        start: Start = "svd",
        pretrained: Pretrained = "discard",
        alpha: float = 14.0,
    ) -> None:
        if not 0 < density <= 1:
            raise UserError(f"adapter.method.density: {density} is not in (0, 1]")
        if not 0 <= gamma <= 1:
            raise UserError(f"adapter.method.gamma: {gamma} is not in [0, 1]")
        if complement_rank < 1:
            raise UserError(f"adapter.method.complement_rank: {complement_rank} is not positive")
        for key, value, known in (
            ("activation", activation, ("silu", "identity")),
            ("start", start, ("svd", "normal")),
            ("pretrained", pretrained, ("discard", "keep")),
        ):
            if value not in known:
                raise UserError(f"adapter.method.{key}: {value!r} is not one of {', '.join(known)}")
        if start == "normal" and pretrained == "keep" and activation == "identity":
            raise UserError("adapter.method.start: normal cannot be subtracted from a weight that is kept: it is not drawn again on load")
        self.rank, self.density, self.gamma, self.activation = rank, density, gamma, activation
        self.complement_rank, self.start, self.pretrained, self.alpha = complement_rank, start, pretrained, alpha
        self.scale = scale_of(alpha, rank, "rank")
        self.identity_at_init = pretrained == "keep"
        self.reads_input = activation == "silu"
        self.merge = "impossible" if activation == "silu" else "exact"

    def columns(self, site: Site) -> int:
        """k"""
        return max(1, int(self.density * site.matrix_shape[1]))

    def adapter(self, site: Site, shared: nn.Module | None) -> LOSTAdapter:
        return (LOSTAdapter if self.activation == "silu" else MergeableLOSTAdapter)(site, self)

    def count(self, site: Site) -> int:
        return self.rank * sum(site.matrix_shape) + site.matrix_shape[0] * self.columns(site)
