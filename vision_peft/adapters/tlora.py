"""TLoRA: the frozen weight is multiplied by a trained transform near the identity, and a low-rank residual is added.

    W' = W T + s D,    s = alpha / sqrt(R)

Transform: T (n, n) is a ring of cores, one a factor of n = I_1 ... I_D (here D = 3, as equal as n allows; index 1 is the slowest):

    T[(i_1..i_D), (j_1..j_D)] = tr(A^1[i_1, j_1] ... A^D[i_D, j_D]),    A^d (I_d, I_d, R_T, R_T) = I / R_T at the start, so T = I

With R_T = 1 it is the Kronecker product of D square matrices; R_T = 0 leaves it out. Residual, zero at the start:

    lora    D = B A,  A (R, n) ~ N(0, 1 / (3 n)), B (m, R) = 0                                     the paper's TLoRA*(R_T, R)
    ring    D[(o..), (i..)] = tr(B^1[o_1] ... B^D[o_D] C^1[i_1] ... C^D[i_D]), C^d (I_d, R, R) of deviation 1 / sqrt(I_d),
            B^d (O_d, R, R) of deviation sqrt(O_d) / R^2, B^1 = 0                                  the paper's TLoRA(R_T, R)

Trained: R_T^2 sum I_d^2 + R (m + n) numbers a weight (lora) or R_T^2 sum I_d^2 + R^2 (sum O_d + sum I_d) (ring). W is frozen.
From that start the R_T^2 slices of a core get equal gradients and stay equal, up to rounding, so R_T > 1 can do no more than R_T = 1
(there is a test of it). `symmetry_break` takes T = I + ring(A) - ring(A_0) instead, A_0 = I / R_T with noise: still the identity, but
the slices part.

Source: "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models", ICCV 2025, arXiv
2501.08727; read: the training and layer code of marcocst/PEFTDiff, and accounts of the paper's section 3. `symmetry_break` is this
project's, the penalties the paper's. A third residual of that code, a ring of (O_d, I_d, R, R) cores, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import require_rank, scale_of
from vision_peft.adapters._tensor_ring import chain, gram_core, identity_core, most_equal, times_ring
from vision_peft.engine.adapter import Adapter, Evidence, Factored, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError

Residual = Literal["lora", "ring"]
_PUBLISHED = {320: (4, 8, 10)}  # of the widths in the paper's models the one that is not split as equally as it can be
_LARGEST_FACTOR = 64


class TLoRAAdapter(Adapter):
    def __init__(self, site: Site, method: TLoRA) -> None:
        super().__init__()
        self.noise, self.scale = method.symmetry_break, method.scale
        self.weights = method.identity_penalty, method.orthogonal_penalty
        self.transform_rank, self.std = method.transform_rank, method.ring_std
        self.transform = nn.ParameterList(torch.zeros(i, i, self.transform_rank, self.transform_rank) for i in method.inputs(site))
        for d, core in enumerate(self.transform):
            self.register_buffer(f"start{d}", torch.zeros_like(core), persistent=False)  # (I_d, I_d, R_T, R_T)
        self.ring, R = method.residual == "ring", method.rank
        if self.ring:
            self.B = nn.ParameterList(torch.zeros(o, R, R) for o in method.factors_of(site, 0))
            self.C = nn.ParameterList(torch.zeros(i, R, R) for i in method.factors_of(site, 1))
        else:
            m, n = require_rank(site, R)
            self.A, self.B = nn.Parameter(torch.zeros(R, n)), nn.Parameter(torch.zeros(m, R))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        for core, start in zip(self.transform, self.starts()):
            start.copy_(identity_core(core))
            if self.noise > 0:
                _add_normal(start, self.noise, evidence.generator)
            core.copy_(start)
        if not self.ring:
            self.B.zero_()
            _add_normal(self.A.zero_(), 1 / math.sqrt(3 * W.shape[1]), evidence.generator)
            return
        for core in (*self.B, *self.C):
            core.zero_()
        for core in self.B[1:]:
            _add_normal(core, self.std * math.sqrt(len(core)) / core.shape[-1] ** 2, evidence.generator)
        for core in self.C:
            _add_normal(core, self.std / math.sqrt(len(core)), evidence.generator)

    def starts(self) -> list[Tensor]:
        """The cores that give T = I."""
        return [self.get_buffer(f"start{d}") for d in range(len(self.transform))]

    def weight(self, W: Tensor) -> Tensor:
        B, A = self._residual()
        if not len(self.transform):
            return torch.addmm(W, B, A)
        moved = times_ring(W, self.transform)
        if self.noise > 0:
            with torch.no_grad():
                still = times_ring(W, self.starts())
            moved = W + (moved - still)
        return torch.addmm(moved, B, A)

    def factored(self, W: Tensor) -> Factored | None:
        return None if len(self.transform) else Factored(*self._residual())

    def _residual(self) -> tuple[Tensor, Tensor]:
        """(m, R), (R, n); of a ring (m, R^2), (R^2, n): the trace is a sum over the two bonds between outputs and inputs."""
        if not self.ring:
            return self.scale * self.B, self.A
        left, right = chain(self.B), chain(self.C)
        return self.scale * left.flatten(1), right.mT.flatten(1).mT

    def penalty(self) -> Tensor | float:
        """Distance of the transform's cores from the start, and of the transform from an orthogonal one; sums of Frobenius norms."""
        identity, orthogonal = self.weights
        total = 0.0
        if identity > 0:
            total = identity * sum(_norms(core - start, (0, 1)).sum() for core, start in zip(self.transform, self.starts()))
        if orthogonal > 0:
            total = total + orthogonal * sum(_norms(gram_core(core), (2, 3)).sum() for core in self.transform)
        return total

    def fingerprint(self) -> Tensor | None:
        """Marks of the noise, which is drawn anew on load."""
        if not (self.noise > 0 and len(self.transform)):
            return None
        noise = [((start - identity_core(start)) / self.noise).flatten() for start in self.starts()]
        return torch.stack([each @ torch.cos(1.7 * torch.arange(len(each)).to(each)) for each in noise])


def _norms(values: Tensor, dims: tuple[int, int]) -> Tensor:
    return torch.linalg.vector_norm(values, dim=dims)


def _add_normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    tensor.add_((std * torch.randn(tensor.shape, generator=generator)).to(tensor))


class TLoRA(Method):
    """Transformed low-rank adaptation.

    Args:
        transform_rank: R_T of the transform; 1 for a Kronecker product, 0 for none.
        rank: R of the residual.
        alpha: numerator of the residual's scale alpha / sqrt(R).
        residual: `lora` (in the paper marked by a star) or `ring`.
        symmetry_break: standard deviation of the noise on the cores' start; 0 is the paper's start.
        factors: factorisations to use instead of the most equal one into three, e.g. [[8, 8, 12], [10, 100]]; each for sides of
            its product.
        ring_std: multiplies the deviations at which a ring starts.
        identity_penalty: weight of the penalty that keeps the transform's cores at their start.
        orthogonal_penalty: weight of the penalty that keeps the transform orthogonal; not with symmetry_break.
    """

    kind = "kronecker"
    formula = "R_T^2 sum I_d^2 + R (m + n)"
    advice = "a transform on one side plus a residual is wanted, as in adapting generators to a subject."

    def __init__(
        self,
        transform_rank: int = 2,
        rank: int = 4,
        alpha: float = 1.0,
        residual: Residual = "lora",
        symmetry_break: float = 0.0,
        factors: list[list[int]] | None = None,
        ring_std: float = 1.0,
        identity_penalty: float = 0.0,
        orthogonal_penalty: float = 0.0,
    ) -> None:
        if residual not in ("lora", "ring"):
            raise UserError(f"adapter.method.residual: {residual!r} is not one of lora, ring")
        if transform_rank < 0:
            raise UserError(f"adapter.method.transform_rank: {transform_rank} is negative")
        of_transform = {"symmetry_break": symmetry_break, "identity_penalty": identity_penalty, "orthogonal_penalty": orthogonal_penalty}
        for key, value in of_transform.items():
            if value < 0:
                raise UserError(f"adapter.method.{key}: {value} is negative")
            if transform_rank == 0 and value > 0:
                raise UserError(f"adapter.method.{key}: there is no transform, transform_rank is 0")
        if ring_std <= 0:
            raise UserError(f"adapter.method.ring_std: {ring_std} is not positive")
        if orthogonal_penalty > 0 and symmetry_break > 0:
            raise UserError("adapter.method.orthogonal_penalty: it holds for a transform that starts without symmetry_break")
        for each in factors or []:
            if not each or min(each) < 1:
                raise UserError(f"adapter.method.factors: {each} is not a list of positive numbers")
        self.transform_rank, self.rank, self.alpha, self.residual = transform_rank, rank, alpha, residual
        self.symmetry_break, self.factors, self.ring_std = symmetry_break, factors, ring_std
        self.identity_penalty, self.orthogonal_penalty = identity_penalty, orthogonal_penalty
        self.scale = scale_of(alpha, rank, "sqrt_rank")

    def factors_of(self, site: Site, side: int) -> tuple[int, ...]:
        """Factors of a site's rows (side 0) or columns (side 1), two at least; UserError where one is too large to be wanted."""
        size = site.matrix_shape[side]
        for given in self.factors or []:
            if math.prod(given) == size:
                return (1, *given) if len(given) == 1 else tuple(given)
        found = _PUBLISHED.get(size) or most_equal(size)
        if max(found) > _LARGEST_FACTOR:
            split = " x ".join(map(str, found))
            raise UserError(
                f"adapter.method.factors: {size}, a side of {site.name}, splits no better than into {split}: a core of {max(found)} is "
                "used only where you list it here"
            )
        return found

    def inputs(self, site: Site) -> tuple[int, ...]:
        """The factors of the transform; none where there is none."""
        return self.factors_of(site, 1) if self.transform_rank else ()

    def adapter(self, site: Site, shared: nn.Module | None) -> TLoRAAdapter:
        return TLoRAAdapter(site, self)

    def param_groups(self, adapters: Mapping[str, TLoRAAdapter], shared: nn.Module | None, lr: float) -> list[dict[str, Any]]:
        transform = [core for adapter in adapters.values() for core in adapter.transform]
        known = {id(core) for core in transform}
        residual = [p for adapter in adapters.values() for p in adapter.parameters() if id(p) not in known]
        groups = [{"params": residual, "name": "residual"}]
        # decay would pull the transform to zero, not to the identity
        return [*groups, {"params": transform, "weight_decay": 0.0, "name": "transform"}] if transform else groups

    def count(self, site: Site) -> int:
        transform = self.transform_rank**2 * sum(i * i for i in self.inputs(site))
        if self.residual == "lora":
            return transform + self.rank * sum(site.matrix_shape)
        return transform + self.rank**2 * sum(sum(self.factors_of(site, side)) for side in (0, 1))
