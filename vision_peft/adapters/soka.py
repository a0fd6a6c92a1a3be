"""SoKA: the weight's leading Kronecker products are trained, and its spectrum says how many.

    W' = W_res + sum_k A_k kron B_k,    W_res = W - sum_k A0_k kron B0_k,    k = 1 .. r

W (m1 m2, n1 n2); A (r, m1, n1), B (r, m2, n2). The Kronecker-product SVD W = sum_k s_k U_k kron V_k (an SVD of the rearranged weight)
gives the start A0_k = sqrt(s_k) U_k, B0_k = sqrt(s_k) V_k, so W' = W. Trained: r (m1 n1 + m2 n2) numbers a weight. W_res is frozen and
never stored: W' = W + sum_k ((A_k - A0_k) kron B_k + A0_k kron (B_k - B0_k)), which is W itself at the start; A0 and B0 are recomputed
from W on load. m1 and n1 are the largest divisors of m and n not above their square roots.

Rank, by default: r = min(r_E, r_L, max_rank). r_E is the smallest number of terms that holds the share `energy` of the squared s_k; r_L
counts the terms before the elbow of s, the point farthest from the chord between its first and last point. With `reselect_every` the
energy rule runs again while training: terms outside the smallest set that holds that share of the current terms' energies
||A_k||^2 ||B_k||^2 stay as they are from then on. The energies of the fixed ones still count, so a steady spectrum loses no more terms.

Source: "Singular Value Decomposition on Kronecker Adaptation for Large Language Model", arXiv 2506.15251; reconstructed from the abstract,
introduction and a review: factor shapes, both rank rules, the absorbed s_k, re-selection, and the start from a gradient (its Kronecker
directions in the sizes of the weight's s_k, subtracted again) are this project's reading.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Clock, Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.kronecker import balanced_split, kronecker_sum, kronecker_svd
from vision_peft.linalg.svd import basis_mark, energy_rank

Selection = Literal["both", "energy", "elbow"]
Elbow = Literal["chord", "second_difference"]
SMALLEST = 1e-3  # of a term's size at the start: from a term of size zero no factor would ever get a gradient


class SoKAAdapter(Adapter):
    A0: Tensor  # (r, m1, n1)
    B0: Tensor  # (r, m2, n2)
    active: Tensor | None  # (r,), False for terms that are no longer trained
    A_kept: Tensor | None  # (r, m1, n1), of use where not active
    B_kept: Tensor | None  # (r, m2, n2)

    def __init__(self, site: Site, method: SoKA) -> None:
        super().__init__()
        self.method, self.split = method, balanced_split(*site.matrix_shape)
        if method.rank is not None and method.rank > self.split.terms:
            text = f"a {' x '.join(map(str, site.matrix_shape))} matrix of {self.split.terms} Kronecker products"
            raise UserError(f"adapter.method.rank: {method.rank} does not fit {site.name}, {text}")
        for name in ("A", "B", "sigma"):
            self.register_parameter(name, None)
        from_gradient = method.init_from == "gradient"
        for name, persistent in {"A0": from_gradient, "B0": from_gradient, "active": True, "A_kept": True, "B_kept": True}.items():
            self.register_buffer(name, None, persistent=persistent)
        if method.rank is not None:
            self._allocate(method.rank, torch.empty(0))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        U, S, V = kronecker_svd(W, self.split)
        r = self.method.choose(S)
        if self.A is None or len(self.A) != r:
            self._allocate(r, W)
        if self.method.init_from == "gradient":
            if evidence.gradient is None:
                return  # A0 and B0 are loaded
            U, _, V = kronecker_svd(evidence.gradient, self.split, frozen=False)
        size = S[:r, None, None].clamp(min=SMALLEST)
        if self.sigma is None:
            self.A0, self.B0 = size.sqrt() * U[:r], size.sqrt() * V[:r]
            self.A.copy_(self.A0)
        else:
            self.A0, self.B0 = size * U[:r], V[:r].clone()
            self.A.copy_(U[:r])
            self.sigma.copy_(size.flatten())
        self.B.copy_(self.B0)

    def _allocate(self, r: int, like: Tensor) -> None:
        """Tensors for r terms, in the type and on the device of `like`."""
        m1, n1, m2, n2 = self.split
        self.A = nn.Parameter(like.new_zeros(r, m1, n1))
        self.B = nn.Parameter(like.new_zeros(r, m2, n2))
        self.A0, self.B0 = like.new_zeros(r, m1, n1), like.new_zeros(r, m2, n2)
        if self.method.train_sigma:
            self.sigma = nn.Parameter(like.new_zeros(r))
        if self.method.reselect_every:
            self.active = torch.ones(r, dtype=torch.bool, device=like.device)
            self.A_kept, self.B_kept = like.new_zeros(r, m1, n1), like.new_zeros(r, m2, n2)

    def terms(self) -> tuple[Tensor, Tensor]:
        """A (r, m1, n1) with sigma folded in, and B (r, m2, n2); fixed terms without gradient."""
        A = self.A if self.sigma is None else self.sigma[:, None, None] * self.A
        if self.active is None:
            return A, self.B
        active = self.active[:, None, None]
        return torch.where(active, A, self.A_kept), torch.where(active, self.B, self.B_kept)

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.terms()
        return W + kronecker_sum(torch.cat([A - self.A0, self.A0]), torch.cat([B, B - self.B0]))

    def reselect(self, energy: float) -> None:
        """Fix the terms that the energy rule no longer keeps, at their present values."""
        A, B = self.terms()
        sizes, order = (A.flatten(1).norm(dim=1) * B.flatten(1).norm(dim=1)).sort(descending=True, stable=True)
        dropped = order[energy_rank(sizes, energy) :]
        dropped = dropped[self.active[dropped]]
        self.A_kept[dropped], self.B_kept[dropped] = A[dropped], B[dropped]
        self.active[dropped] = False

    def fingerprint(self) -> Tensor | None:
        return None if self.method.init_from == "gradient" else basis_mark(self.A0.flatten(1).mT, self.B0.flatten(1))


class SoKA(Method):
    """Training of the principal Kronecker products.

    Args:
        rank: r, for every weight alike; null lets the spectrum choose.
        selection: the rule that chooses: `energy`, `elbow`, or the smaller of `both`.
        energy: share of the squared values that r_E holds, in (0, 1].
        elbow: `chord`, or `second_difference` for the largest s_(k-1) - 2 s_k + s_(k+1).
        max_rank: upper bound of the choice.
        train_sigma: keep s_k as a trained number of its own, with U_k and V_k as factors.
        init_from: `weight`, or `gradient` of the calibration batches, which needs a fixed rank.
        reselect_every: steps between re-selections while training; 0 for none.
    """

    kind = "kronecker"
    source = "abstract"
    formula = "r (m1 n1 + m2 n2), m = m1 m2, n = n1 n2"
    advice = "the spectrum should decide how many Kronecker products each layer trains."
    tiny = {"selection": "energy", "energy": 1.0, "max_rank": 2}

    def __init__(
        self,
        rank: int | None = None,
        selection: Selection = "both",
        energy: float = 0.9,
        elbow: Elbow = "chord",
        max_rank: int = 8,
        train_sigma: bool = False,
        init_from: Literal["weight", "gradient"] = "weight",
        reselect_every: int = 0,
    ) -> None:
        for key, value, choices in (
            ("selection", selection, ("both", "energy", "elbow")),
            ("elbow", elbow, ("chord", "second_difference")),
            ("init_from", init_from, ("weight", "gradient")),
        ):
            if value not in choices:
                raise UserError(f"adapter.method.{key}: {value!r} is not one of {', '.join(choices)}")
        if rank is not None and rank < 1:
            raise UserError(f"adapter.method.rank: {rank} is not positive")
        if not 0 < energy <= 1:
            raise UserError(f"adapter.method.energy: {energy} is not in (0, 1]")
        if max_rank < 1:
            raise UserError(f"adapter.method.max_rank: {max_rank} is not positive")
        if reselect_every < 0:
            raise UserError(f"adapter.method.reselect_every: {reselect_every} is negative")
        if init_from == "gradient" and rank is None:
            raise UserError("adapter.method.rank: init_from gradient needs a number, since shapes must not depend on a gradient")
        self.rank, self.selection, self.energy, self.elbow, self.max_rank = rank, selection, energy, elbow, max_rank
        self.train_sigma, self.init_from, self.reselect_every = train_sigma, init_from, reselect_every
        self.evidence = ("gradient",) if init_from == "gradient" else ()

    def choose(self, S: Tensor) -> int:
        """r for a spectrum S (K,)."""
        if self.rank is not None:
            return self.rank
        by_energy = energy_rank(S, self.energy) if self.selection != "elbow" else self.max_rank
        by_elbow = elbow_rank(S, self.elbow) if self.selection != "energy" else self.max_rank
        return min(by_energy, by_elbow, self.max_rank, S.numel())

    def coordinate(self, adapters: dict[str, SoKAAdapter], shared: nn.Module | None, clock: Clock) -> None:
        if self.reselect_every and clock.step % self.reselect_every == 0:
            for adapter in adapters.values():
                adapter.reselect(self.energy)

    def adapter(self, site: Site, shared: nn.Module | None) -> SoKAAdapter:
        return SoKAAdapter(site, self)

    def count(self, site: Site) -> int | None:
        if self.rank is None:
            return None
        m1, n1, m2, n2 = balanced_split(*site.matrix_shape)
        return self.rank * (m1 * n1 + m2 * n2 + self.train_sigma)


def elbow_rank(S: Tensor, elbow: Elbow) -> int:
    """How many values come before the elbow of S (K,), which descends; at least one."""
    S = S.double()
    if S.numel() < 3:
        return 1
    if elbow == "second_difference":
        return 1 + int((S[:-2] - 2 * S[1:-1] + S[2:]).argmax())
    chord = torch.linspace(float(S[0]), float(S[-1]), S.numel(), dtype=S.dtype, device=S.device)
    return max(1, int((S - chord).abs().argmax()))  # the vertical distance is a fixed multiple of that from the chord
