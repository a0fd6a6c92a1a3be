"""LoCA: the update is an inverse cosine transform of a few coefficients, whose positions in the spectrum are learned too.

    W' = W + s C_m^T S C_n,    S[row_k, col_k] += a_k,    row_k = round(l_1k (m - 1)),  col_k = round(l_2k (n - 1))

C_m (m, m), C_n (n, n): orthonormal DCT-II matrices; a (c,) coefficients, zero at the start, so W' = W; l (2, c) locations, drawn
from U(0, 1) and kept in [0, 1]; coefficients that meet on one position add up. With K = C_m (dL/d(W'/s)) C_n^T:

    dL/da_k = K[row_k, col_k],    dL/d row_k = clamp(a_k (K[row_k + 1, col_k] - K[row_k - 1, col_k]) / 2, -1, 1)

the same for columns; at a border the index itself stands for the missing neighbour. Schedule, in optimizer steps: blocks of
`coefficient_steps` and `location_steps` by turns, until the share `location_share` of the run is over; then coefficients alone. The
group whose turn it is not gets no gradient at all, so the optimizer leaves its values and its moments as they are.

Trained: c coefficients and, at first, their 2 c positions: 3 c numbers a weight, of which the paper counts the c that remain.
A matrix with fewer entries than c gets as many coefficients as it has entries. Everything of W is frozen.

Source: "LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning", ICLR 2025, arXiv 2502.06820; read: the abstract
and the authors' transform, layer and schedule (TL-UESTC/LoCA). Their clamp of the locations to [0, .999], by which the last row of a
768 layer cannot be reached, is `variant: official`. Gradient clipping by a global norm would mix location gradients, which are m - 1
times larger, with the rest: train without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Clock, Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.dct import dct_matrix

Variant = Literal["corrected", "official"]


class LoCAAdapter(Adapter):
    locating: Tensor  # (): whether the locations have their turn

    def __init__(self, site: Site, method: LoCA) -> None:
        super().__init__()
        coefficients = method.size(site)
        self.scale, self.upper = method.scale, 1.0 if method.variant == "corrected" else 0.999
        self.a = nn.Parameter(torch.zeros(coefficients))
        self.locations = nn.Parameter(torch.zeros(2, coefficients), requires_grad=method.location_share > 0)
        self.register_buffer("locating", torch.tensor(False))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.a.zero_()
        self.locations.copy_(torch.rand(self.locations.shape, generator=evidence.generator))
        self.locating.fill_(False)

    def weight(self, W: Tensor) -> Tensor:
        wide = W.shape[0] <= W.shape[1]  # the transform is cheaper along the shorter side
        size, locations = (W.shape, self.locations) if wide else (W.shape[::-1], self.locations.flip(0))
        D = _InverseCosine.apply(self.a, locations, dct_matrix(size[0], W), dct_matrix(size[1], W), self.upper, bool(self.locating))
        return torch.add(W, D if wide else D.mT, alpha=self.scale)


class _InverseCosine(torch.autograd.Function):
    """C_p^T S C_q (p, q). Sparse on the right: S C_q adds c rows of C_q, so that one dense product of p p q remains."""

    @staticmethod
    def forward(a: Tensor, locations: Tensor, C_p: Tensor, C_q: Tensor, upper: float, locating: bool) -> Tensor:
        rows, cols = _positions(locations, len(C_p), len(C_q), upper)
        S_C = a.new_zeros(len(C_p), len(C_q)).index_add_(0, rows, a[:, None] * C_q[cols])
        return C_p.mT @ S_C

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, locations, C_p, C_q, ctx.upper, ctx.locating = inputs
        ctx.save_for_backward(a, locations, C_p, C_q)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        a, locations, C_p, C_q = ctx.saved_tensors
        p, q = len(C_p), len(C_q)
        rows, cols = _positions(locations, p, q, ctx.upper)
        H = C_p @ G  # (p, q); K = H C_q^T, of which only the entries at the positions and beside them are computed
        if not ctx.locating:
            return (H[rows] * C_q[cols]).sum(1), None, None, None, None, None
        down = (H[(rows + 1).clamp(max=p - 1)] - H[(rows - 1).clamp(min=0)]) * C_q[cols]  # (c, q)
        right = H[rows] * (C_q[(cols + 1).clamp(max=q - 1)] - C_q[(cols - 1).clamp(min=0)])
        slope = (0.5 * a * torch.stack([down.sum(1), right.sum(1)])).clamp(-1, 1)  # (2, c), an index
        inside = (locations >= 0) & (locations <= ctx.upper)
        return None, slope * slope.new_tensor([[p - 1], [q - 1]]) * inside, None, None, None, None


def _positions(locations: Tensor, p: int, q: int, upper: float) -> tuple[Tensor, Tensor]:
    """Whole rows and columns (c,) of the locations."""
    scaled = locations.detach().clamp(0, upper) * locations.new_tensor([[p - 1], [q - 1]])
    rows, cols = scaled.round().long()
    return rows, cols


class LoCA(Method):
    """Location-aware cosine adaptation.

    Args:
        coefficients: c of every weight, or all its entries where it has fewer.
        scale: s.
        coefficient_steps: optimizer steps of a block of coefficients; the first block is one of these.
        location_steps: optimizer steps of a block of locations.
        location_share: of the run, after which locations stay; 0 leaves them where they were drawn, and they are not trained. In a
            run of fewer than coefficient_steps / location_share steps they never move.
        location_lr: their learning rate, whatever the optimizer's is.
        variant: `official` clamps locations at .999.
    """

    kind = "frequency"
    formula = "3 c (c coefficients, 2 c positions)"
    advice = "a frequency method should also learn which frequencies; needs runs of a hundred steps and more."
    tiny = {"coefficients": 24, "coefficient_steps": 1, "location_steps": 1, "location_share": 0.5}

    def __init__(
        self,
        coefficients: int = 1000,
        scale: float = 1.0,
        coefficient_steps: int = 10,
        location_steps: int = 20,
        location_share: float = 0.1,
        location_lr: float = 1e-4,
        variant: Variant = "corrected",
    ) -> None:
        counts = {"coefficients": coefficients, "coefficient_steps": coefficient_steps, "location_steps": location_steps}
        for key, value in counts.items():
            if value < 1:
                raise UserError(f"adapter.method.{key}: {value} is not positive")
        if not 0 <= location_share <= 1:
            raise UserError(f"adapter.method.location_share: {location_share} is not in [0, 1]")
        if location_lr <= 0:
            raise UserError(f"adapter.method.location_lr: {location_lr} is not positive")
        if variant not in ("corrected", "official"):
            raise UserError(f"adapter.method.variant: {variant!r} is not one of corrected, official")
        self.coefficients, self.scale, self.variant = coefficients, scale, variant
        self.coefficient_steps, self.location_steps = coefficient_steps, location_steps
        self.location_share, self.location_lr = location_share, location_lr
        # a run so long that a step of locations falls into its first share
        self.steps_to_train = math.ceil((coefficient_steps + 1) / location_share) if location_share else 2

    def size(self, site: Site) -> int:
        """c of a site."""
        return min(self.coefficients, math.prod(site.matrix_shape))

    def locates(self, step: int, total: int) -> bool:
        """Whether the step after `step` steps of `total` is one of locations."""
        within = step % (self.coefficient_steps + self.location_steps) >= self.coefficient_steps
        return within and step < int(self.location_share * total + 1e-9)

    def adapter(self, site: Site, shared: nn.Module | None) -> LoCAAdapter:
        return LoCAAdapter(site, self)

    def adjust_gradients(self, adapters: Mapping[str, LoCAAdapter], shared: nn.Module | None, clock: Clock) -> None:
        for adapter in adapters.values():  # None after backward already, but data-parallel training fills in zeros, which decay moments
            (adapter.a if adapter.locating else adapter.locations).grad = None

    def coordinate(self, adapters: Mapping[str, LoCAAdapter], shared: nn.Module | None, clock: Clock) -> None:
        for adapter in adapters.values():
            adapter.locating.fill_(self.locates(clock.step, clock.total))

    def param_groups(self, adapters: Mapping[str, LoCAAdapter], shared: nn.Module | None, lr: float) -> list[dict[str, Any]]:
        coefficients = [{"params": [adapter.a for adapter in adapters.values()], "name": "coefficients"}]
        if not self.location_share:
            return coefficients
        own = [adapter.locations for adapter in adapters.values()]  # decay would draw them to the low frequencies
        return [*coefficients, {"params": own, "lr": self.location_lr, "weight_decay": 0.0, "name": "locations"}]

    def count(self, site: Site) -> int:
        return (3 if self.location_share else 1) * self.size(site)
