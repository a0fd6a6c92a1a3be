"""Bayesian-LoRA: the factors of a LoRA are quantised, and random gates that are trained with it find its bit widths and its rank.

    W' = W + s Q_B(B) diag(e * rho) Q_A(A)        A (r, n), B (m, r), e (r,), s = alpha / r
    Q(x) = x_2 + z_4 (e_4 + z_8 (e_8 + z_16 e_16)): 2-bit codes and what 4, 8 and 16 bits add to them, in a trained range [-beta, beta]
    rho_k = g_1 g_2 ... g_k: ranks close from the last one on (`rank_gates: nested`), or rho_k = g_k (`independent`)

Gates z (for each factor) and g (for each rank) are hard-concrete: in [0, 1] and random while training, one draw a forward pass;
0 or 1 in evaluation, as P(z > 0) = q(phi) = sigmoid(phi + 1.5986) says. Added to the loss, means over the F factors and L weights:

    bits / F * sum over factors of (c_2 + c_4 q_4 + c_8 q_4 q_8 + c_16 q_4 q_8 q_16)  +  ranks / L * sum over weights of E[rank]

with c_b = 1 (`const`), or c_b = b times the factor's size over the largest, times E[rank] / r (`bop`). It rises over the first
`warm_up` of the run, so that nothing closes before it has learned. In the last `settle` the gates keep their evaluation values while
the rest is tuned on. Gradients pass straight through the rounding.

Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, e = 1, beta = max|A| for A and 0.05 for B, all gates at `phi`, so W' = W. Trained, with k bit
gates (3 for 16 bits): r (m + n) + 2 r + 2 (k + 1) numbers a weight, without rank gates r less. W is frozen in full precision.

Source: Meo, Sycheva, Goyal, Dauwels, "Bayesian-LoRA: LoRA based PEFT using Optimal Quantization Levels and Rank Values through
Differentiable Bayesian Gates", WANT at ICML 2024; reconstructed from its abstract and from Bayesian Bits (van Baalen et
al., NeurIPS 2020; code: Qualcomm-AI-research/BayesianBits): diag(e), one range and one chain of gates a factor, inputs in full precision,
schedule and weights are this project's choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._gated import PrunedAdapter
from vision_peft.adapters._low_rank import LowRankAdapter, scale_of
from vision_peft.engine.adapter import Clock, Evidence, Factored, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.gates import nested, open_probability, sample_gates, settled_gates
from vision_peft.linalg.quantise import BITS, gated_quantise

RankGates = Literal["nested", "independent", "none"]


class BayesianLoRAAdapter(LowRankAdapter):
    strength: Tensor  # (), of the penalty
    settled: Tensor  # (), whether the gates keep their evaluation values

    def __init__(self, site: Site, method: BayesianLoRA) -> None:
        super().__init__(site, method.rank, method.scale, dropout=0.0)
        self.method = method
        self.e = nn.Parameter(torch.ones(method.rank))
        self.ranges = nn.Parameter(torch.ones(2))  # beta of A and of B
        self.bit_gates = nn.Parameter(torch.zeros(2, BITS.index(method.max_bits)))  # phi of A and of B, for 4, 8, ... bits
        self.rank_gates = nn.Parameter(torch.zeros(method.rank)) if method.rank_gates != "none" else None
        self.register_buffer("strength", torch.tensor(0.0 if method.warm_up else 1.0))
        self.register_buffer("settled", torch.tensor(False))
        self.sites, self.widest = 1, max(site.matrix_shape)  # of the whole set, once allocate() has seen it

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        super().initialize(W, evidence)
        self.e.fill_(1.0)
        self.ranges.copy_(torch.stack([self.A.abs().max(), self.A.new_tensor(0.05)]))  # B is zero, and its range must not be
        for phi in self.gates():
            phi.fill_(self.method.phi)
        self.eval()  # nothing is random until a layer in training mode asks: an export may come before any call

    def gates(self) -> list[nn.Parameter]:
        return [self.bit_gates] if self.rank_gates is None else [self.bit_gates, self.rank_gates]

    def factored(self, W: Tensor) -> Factored:
        A, B = self._quantised()
        return Factored(self.scale * (self.e * self._rho()) * B, A)

    def penalty(self) -> Tensor:
        method, q = self.method, nested(open_probability(self.bit_gates))  # (2, k)
        weights = q.new_tensor(BITS[: q.shape[1] + 1]) if method.cost == "bop" else q.new_ones(q.shape[1] + 1)
        own = weights[0] + q @ weights[1:]  # (2,)
        if method.cost == "bop":
            own = own * q.new_tensor([self.A.shape[1], self.B.shape[0]]) / self.widest * self.expected_rank() / len(self.e)
        total = method.bits / (2 * self.sites) * own.sum()
        if self.rank_gates is not None:
            total = total + method.ranks / self.sites * self.expected_rank()
        return self.strength * total

    def expected_rank(self) -> Tensor | float:
        return len(self.e) if self.rank_gates is None else self._chain(open_probability(self.rank_gates)).sum()

    @torch.no_grad()
    def widths(self) -> tuple[int, int]:
        """Bits of A and of B in evaluation."""
        return tuple(BITS[int(opened)] for opened in nested(settled_gates(self.bit_gates)).sum(1))

    @torch.no_grad()
    def kept(self) -> Tensor:
        """Indices of the ranks that are open in evaluation."""
        gates = torch.ones_like(self.e) if self.rank_gates is None else self._chain(settled_gates(self.rank_gates))
        return gates.nonzero().flatten()

    @torch.no_grad()
    def compact(self) -> PrunedAdapter:
        """The open ranks, quantised as in evaluation, as an ordinary LoRA."""
        kept = self.kept()
        A, B = (gated_quantise(*pair, settled_gates(phi)) for pair, phi in zip(self._with_ranges(), self.bit_gates))
        return PrunedAdapter((self.e * B)[:, kept], A[kept], self.scale)

    def _quantised(self) -> list[Tensor]:
        return [gated_quantise(x, limit, z) for (x, limit), z in zip(self._with_ranges(), self._drawn(self.bit_gates))]

    def _rho(self) -> Tensor:
        return torch.ones_like(self.e) if self.rank_gates is None else self._chain(self._drawn(self.rank_gates))

    def _with_ranges(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip((self.A, self.B), self.ranges.abs()))  # a range that crosses zero in a large step is still one

    def _drawn(self, phi: Tensor) -> Tensor:
        # without a branch on `settled`, which would wait for the device
        return torch.where(self.settled, settled_gates(phi), sample_gates(phi)) if self.training else settled_gates(phi)

    def _chain(self, gates: Tensor) -> Tensor:
        return nested(gates) if self.method.rank_gates == "nested" else gates


class BayesianLoRA(Method):
    """LoRA with learned bit widths and ranks.

    Args:
        rank: r, the largest rank.
        alpha: numerator of the scale alpha / r.
        max_bits: 4, 8, 16 or 32; below the noise of float32 the last one has no effect.
        rank_gates: `nested`, `independent`, or `none` to learn bit widths alone.
        bits: weight of the penalty on bit widths.
        ranks: weight of the penalty on ranks.
        cost: `const` charges every doubling of bits alike, `bop` what it costs in bit operations.
        phi: of all gates at the start; 6 is open with probability 0.9995.
        warm_up: share of the run over which the penalty rises.
        settle: share of the run, at its end, with gates at their evaluation values.
        gate_lr: learning rate of the phi; they and the ranges have no weight decay.
        range_lr: learning rate of the ranges.
    """

    low_rank = True
    kind = "gated"
    source = "abstract"
    steps_to_train = 3  # gates start open for certain: the penalty moves them, and it is zero at the first step
    formula = "r (m + n) + 2 r + 2 (k + 1)"
    advice = "the adapter itself must be small: bits and ranks are learned, and exported as codes."

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 8.0,
        max_bits: int = 16,
        rank_gates: RankGates = "nested",
        bits: float = 0.01,
        ranks: float = 0.01,
        cost: Literal["const", "bop"] = "const",
        phi: float = 6.0,
        warm_up: float = 0.1,
        settle: float = 0.1,
        gate_lr: float = 1e-2,
        range_lr: float = 1e-3,
    ) -> None:
        if max_bits not in BITS[1:]:
            raise UserError(f"adapter.method.max_bits: {max_bits} is not one of 4, 8, 16, 32")
        if rank_gates not in ("nested", "independent", "none"):
            raise UserError(f"adapter.method.rank_gates: {rank_gates!r} is not one of nested, independent, none")
        if cost not in ("const", "bop"):
            raise UserError(f"adapter.method.cost: {cost!r} is not one of const, bop")
        for key, value in {"bits": bits, "ranks": ranks, "warm_up": warm_up, "settle": settle}.items():
            if value < 0:
                raise UserError(f"adapter.method.{key}: {value} is negative")
        if warm_up + settle >= 1:
            raise UserError(f"adapter.method.settle: {settle} and warm_up {warm_up} leave no steps in which gates are learned")
        for key, value in {"gate_lr": gate_lr, "range_lr": range_lr}.items():
            if value <= 0:
                raise UserError(f"adapter.method.{key}: {value} is not positive")
        self.rank, self.alpha, self.max_bits, self.rank_gates = rank, alpha, max_bits, rank_gates
        self.bits, self.ranks, self.cost, self.phi = bits, ranks, cost, phi
        self.warm_up, self.settle, self.gate_lr, self.range_lr = warm_up, settle, gate_lr, range_lr
        self.scale = scale_of(alpha, rank, "rank")

    def adapter(self, site: Site, shared: nn.Module | None) -> BayesianLoRAAdapter:
        return BayesianLoRAAdapter(site, self)

    def allocate(self, adapters: Mapping[str, BayesianLoRAAdapter], shared: nn.Module | None) -> None:
        widest = max(max(adapter.A.shape[1], adapter.B.shape[0]) for adapter in adapters.values())
        for adapter in adapters.values():
            adapter.sites, adapter.widest = len(adapters), widest

    def adjust_gradients(self, adapters: Mapping[str, BayesianLoRAAdapter], shared: nn.Module | None, clock: Clock) -> None:
        if self._settled(clock):
            for adapter in adapters.values():
                for phi in adapter.gates():
                    phi.grad = None  # a gradient of zero would let the moments of Adam move them on

    def coordinate(self, adapters: Mapping[str, BayesianLoRAAdapter], shared: nn.Module | None, clock: Clock) -> None:
        settled = self._settled(clock)
        risen = min(1.0, clock.step / (self.warm_up * clock.total)) if self.warm_up else 1.0
        for adapter in adapters.values():
            adapter.settled.fill_(settled)
            adapter.strength.fill_(0.0 if settled else risen)

    def _settled(self, clock: Clock) -> bool:
        return clock.step >= round((1 - self.settle) * clock.total, 6)

    def param_groups(self, adapters: Mapping[str, BayesianLoRAAdapter], shared: nn.Module | None, lr: float) -> list[dict[str, Any]]:
        each = adapters.values()
        return [
            {"params": [weight for adapter in each for weight in (adapter.A, adapter.B, adapter.e)], "name": "adapter"},
            {"params": [phi for adapter in each for phi in adapter.gates()], "name": "gates", "lr": self.gate_lr, "weight_decay": 0.0},
            {"params": [adapter.ranges for adapter in each], "name": "ranges", "lr": self.range_lr, "weight_decay": 0.0},
        ]

    def count(self, site: Site) -> int:
        gates = 2 * BITS.index(self.max_bits) + (0 if self.rank_gates == "none" else self.rank)
        return self.rank * (sum(site.matrix_shape) + 1) + gates + 2


def bit_operations(adapters: Mapping[str, BayesianLoRAAdapter], input_bits: int = 32) -> dict[str, float]:
    """What the learned branches cost a token, and the same LoRA in float32: products times bits of the weight times bits of its input.

    The frozen weights, of full precision in both, are left out; `share` is cost over reference, `rank` and `bits` are means.
    """
    cost = reference = ranks = widths = 0
    for adapter in adapters.values():
        rank, (a, b), (out, columns) = len(adapter.kept()), adapter.widths(), (adapter.B.shape[0], adapter.A.shape[1])
        cost += rank * (columns * a + out * b) * input_bits
        reference += len(adapter.e) * (columns + out) * 32 * 32
        ranks, widths = ranks + rank, widths + (a + b) / 2
    return {"cost": cost, "reference": reference, "share": cost / reference, "rank": ranks / len(adapters), "bits": widths / len(adapters)}
