"""LoLDU: the weight is split into lower, diagonal and upper factors, and a diagonal is trained.

    W' = W_res + sigma P L_r diag(z) U_r,    W_res = W - sigma_0 P L_r diag(z_0) U_r,    W = P L diag(D) U

LU with partial pivoting: P (m, m) a permutation, L (m, p) unit lower, U (p, n) unit upper, D (p,) the pivots, p = min(m, n); L_r, U_r are
the leading r columns and rows. Trained: z (r,) and the scalar sigma, r + 1 numbers a weight. P, L_r, U_r are frozen, recomputed on load.
Start: sigma_0 = alpha / r, which is 1 in every published run, and z_0 by `init`; W_res takes the same z_0, so W' = W for all of them.
W' is computed as W + P L_r diag(sigma z - sigma_0 z_0) U_r: both parts of the split can be much larger than W, and they cancel.
Unlike those of an SVD, the leading terms are no good approximation of W.

A pivot below 1e-6 of the largest is taken as zero, and its row of U as the unit vector: rows stay finite, zero weights can be trained.

Source: "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning", arXiv 2410.13618; code:
SKDDJ/LoLDU, which for the starts that do not come from D (ones, zeros, s_uniform, s_normal) subtracts D instead and so changes the
weight: not followed.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_rank
from vision_peft.engine.adapter import Adapter, Evidence, Factored, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.svd import basis_mark

Init = Literal["lu", "uniform", "normal", "constant", "ones", "zeros", "s_uniform", "s_normal"]
SMALLEST = 1e-6  # of the largest pivot


class LoLDUAdapter(Adapter):
    PL: Tensor  # (m, r), rows of L_r in the order of P
    U: Tensor  # (r, n)
    z_0: Tensor  # (r,)

    def __init__(self, site: Site, method: LoLDU) -> None:
        super().__init__()
        self.rank, self.init = method.rank_of(site), method.init
        require_rank(site, self.rank)
        self.sigma_0 = 1.0 if method.alpha is None else method.alpha / self.rank
        self.z = nn.Parameter(torch.zeros(self.rank))
        self.sigma = nn.Parameter(torch.tensor(self.sigma_0), requires_grad=method.train_sigma)
        self.register_buffer("z_0", torch.zeros(self.rank))
        self.register_buffer("PL", None, persistent=False)
        self.register_buffer("U", None, persistent=False)

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        PL, D, U = ldu(W)
        self.PL, self.U = PL[:, : self.rank].contiguous(), U[: self.rank].contiguous()
        self.z_0.copy_(start_values(D[: self.rank], self.init, evidence.generator))
        self.z.copy_(self.z_0)
        self.sigma.fill_(self.sigma_0)

    def _change(self) -> Tensor:
        return self.sigma * self.z - self.sigma_0 * self.z_0  # (r,)

    def weight(self, W: Tensor) -> Tensor:
        return torch.addmm(W, self.PL * self._change(), self.U)

    def factored(self, W: Tensor) -> Factored | None:
        # as SVFit: thin products pay only while r is small
        return Factored(self.PL * self._change(), self.U) if 4 * self.rank <= min(W.shape) else None

    def fingerprint(self) -> Tensor:
        size = self.U.norm(dim=1)  # rows of U may be very long where pivots are small: the mark must see the others too
        return basis_mark(self.PL, self.U / size[:, None])


class LoLDU(Method):
    """Training of the diagonal between lower and upper factors.

    Args:
        rank: r, leading terms that are trained; null for all, as in the paper's best run.
        alpha: sigma starts at alpha / r; null for alpha = r.
        init: z_0: the pivots D (`lu`); U(-c/2, c/2) with c = |mean D| (`uniform`); N(mean D, std D) (`normal`); mean D (`constant`);
            `ones`; `zeros`; U(-1, 1) (`s_uniform`); N(0, 1) (`s_normal`).
        train_sigma: the released code leaves sigma out of what is trained; the paper's counts have it.
    """

    kind = "scaling"
    formula = "r + 1, r = min(m, n) by default"
    advice = "hundreds of numbers a layer must do and a high learning rate is fine."

    def __init__(self, rank: int | None = None, alpha: float | None = None, init: Init = "uniform", train_sigma: bool = True) -> None:
        if init not in get_args(Init):
            raise UserError(f"adapter.method.init: {init!r} is not one of {', '.join(get_args(Init))}")
        if alpha is not None and alpha <= 0:
            raise UserError(f"adapter.method.alpha: {alpha} is not positive")
        self.rank, self.alpha, self.init, self.train_sigma = rank, alpha, init, train_sigma

    def rank_of(self, site: Site) -> int:
        return min(site.matrix_shape) if self.rank is None else self.rank

    def adapter(self, site: Site, shared: nn.Module | None) -> LoLDUAdapter:
        return LoLDUAdapter(site, self)

    def count(self, site: Site) -> int:
        return self.rank_of(site) + self.train_sigma


def ldu(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P L (m, p), D (p,), U (p, n) with W = P L diag(D) U, decomposed in float64; where D is zero, U holds a unit row."""
    P, L, upper = torch.linalg.lu(W.double())
    D = upper.diagonal()
    zero = D.abs() <= SMALLEST * D.abs().max()
    U = torch.where(zero[:, None], torch.eye(*upper.shape, dtype=upper.dtype, device=W.device), upper / D.masked_fill(zero, 1.0)[:, None])
    return L[P.argmax(dim=1)].to(W.dtype), D.masked_fill(zero, 0.0).to(W.dtype), U.to(W.dtype)


def start_values(D: Tensor, init: Init, generator: torch.Generator) -> Tensor:
    """z_0 (r,) for pivots D (r,); random ones are drawn on the CPU."""
    r, mean = D.numel(), D.mean()
    if init == "lu":
        return D
    if init in ("constant", "ones", "zeros"):
        return {"constant": mean, "ones": torch.ones_like(mean), "zeros": torch.zeros_like(mean)}[init].expand(r)
    if init.endswith("uniform"):
        half = 1.0 if init == "s_uniform" else mean.abs() / 2
        return half * (2 * torch.rand(r, generator=generator) - 1).to(D)
    normal = torch.randn(r, generator=generator).to(D)
    return normal if init == "s_normal" else mean + D.std(correction=0) * normal
