"""DiffoRA: a search decides for every module whether it gets a LoRA of its own; the modules that do not share one a type.

    search       W' = W + gamma s B A,  gamma = sigmoid(a), a (1,) a module      A (r, n), B (m, r), s = alpha / r
    then         W' = W + s B A          for the ceil(rho N) of a layer's N modules (q, k, ... of a block) with the largest gamma
                 W' = W + s B' A'        for the others: one pair for all of a type and shape, e.g. every fc1 that was not selected

Start: A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0, a = 0, so W' = W. The first `search` of the run trains pairs and a on alternate steps, each
with the other fixed; for its first `warm_up` only the pairs, since a has no gradient while B = 0. Then the selection is fixed, the
pairs that are used from there on start anew, and gamma is 1. The shared pair is that of the first module that shares it.
Trained during the search: r (m + n) numbers a module and one logit; after it r (m + n) for each selected module, and once for each
type with modules that were not. Pairs out of use stay in the file.

Layers and types are read from the names of the sites: in `vision.3.attn.q` the layer is `vision.3`, the type `vision.#.attn.q`.

Source: "DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation", arXiv 2502.08905;
reconstructed from the abstract: the relaxation, the schedule, and which modules share a pair are this project's choice. The two levels
of the search see different batches of one training set, where the bi-level problem wants two sets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vision_peft.adapters._low_rank import LowRankAdapter, require_dropout, scale_of
from vision_peft.engine.adapter import Clock, Evidence, Factored, Method, Shared
from vision_peft.engine.site import Site
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_


class DiffoRAShared(Shared):
    """The logits, which modules were selected, and whose pair each one uses; modules are numbered in the order of the sites."""

    selected: Tensor  # (modules,) bool: the differential adaptation matrix; all while searching
    pair: Tensor  # (modules,) number of the module whose pair is used; -1 for none
    searching: Tensor  # () bool

    def __init__(self, sites: Sequence[Site], relaxation: Literal["sigmoid", "softmax"]) -> None:
        super().__init__()
        self.relaxation = relaxation
        self.names = [site.name for site in sites]
        self.types = [(layer_and_type(site.name)[1], site.shape) for site in sites]
        self.layers: dict[str, list[int]] = {}
        for number, name in enumerate(self.names):
            self.layers.setdefault(layer_and_type(name)[0], []).append(number)
        self.members: dict[int, DiffoRAAdapter] = {}  # in a plain dict: adapters are saved by their set
        self.logits = nn.Parameter(torch.zeros(len(sites)))
        self.register_buffer("selected", torch.ones(len(sites), dtype=torch.bool))
        self.register_buffer("pair", torch.arange(len(sites)))
        self.register_buffer("searching", torch.tensor(True))

    def gamma(self, number: int) -> Tensor:
        """How much of a module's own pair acts during the search."""
        if self.relaxation == "sigmoid":
            return torch.sigmoid(self.logits[number])
        layer = self.layers[layer_and_type(self.names[number])[0]]
        return len(layer) * torch.softmax(self.logits[layer], 0)[layer.index(number)]

    def penalty(self) -> Tensor | float:
        """Zero. After the search it holds what is out of use, since data-parallel training wants a gradient of every trained tensor."""
        if self.searching:
            return 0.0
        unused = [self.members[number] for number in range(len(self.names)) if number not in self.pair.tolist()]
        return 0.0 * (self.logits.sum() + sum(adapter.A.sum() + adapter.B.sum() for adapter in unused))

    def select(self, share: float, scope: Literal["layer", "global"], sharing: bool) -> None:
        """End the search: keep the largest gammas (of equal ones the first), and give the other modules a common pair a type, or none."""
        self.selected.zero_()
        gammas = torch.stack([self.gamma(number) for number in range(len(self.names))])
        for numbers in self.layers.values() if scope == "layer" else [list(range(len(self.names)))]:
            order = gammas[numbers].argsort(descending=True, stable=True)[: math.ceil(round(share * len(numbers), 9))]
            self.selected[[numbers[place] for place in order.tolist()]] = True
        first: dict[tuple[str, tuple[int, ...]], int] = {}
        for number, chosen in enumerate(self.selected.tolist()):
            if not chosen:
                self.pair[number] = first.setdefault(self.types[number], number) if sharing else -1
        self.searching.fill_(False)


class DiffoRAAdapter(LowRankAdapter):
    shared: DiffoRAShared

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, shared: DiffoRAShared) -> None:
        super().__init__(site, rank, scale, dropout)
        object.__setattr__(self, "shared", shared)
        self.number = shared.names.index(site.name)
        shared.members[self.number] = self
        self.seed = 0

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        super().initialize(W, evidence)
        self.seed = evidence.generator.initial_seed()

    def restart(self) -> None:
        """Back to the start, with the same draw."""
        kaiming_rows_(self.A, torch.Generator().manual_seed(self.seed))
        self.B.zero_()

    def factored(self, W: Tensor) -> Factored:
        if self.shared.searching:
            return Factored(self.shared.gamma(self.number) * self.scale * self.B, self.A, None, self.dropout)
        number = int(self.shared.pair[self.number])
        if number < 0:
            return Factored(self.B.new_zeros(len(self.B), 0), self.A.new_zeros(0, self.A.shape[1]))
        used = self.shared.members[number]
        return Factored(self.scale * used.B, used.A, None, self.dropout)


class DiffoRA(Method):
    """LoRA on the modules that a differentiable search selects.

    Args:
        rank: r.
        alpha: numerator of the scale alpha / r.
        dropout: as LoRA.
        rho: share of the modules that get a pair of their own, in [0, 1].
        scope: whether that share is selected in each layer or among all modules.
        sharing: whether the other modules of a type share a pair; without it they stay frozen.
        relaxation: `sigmoid` of each logit, or `softmax` over the N modules of a layer, times N.
        search: share of the run that goes into the search.
        warm_up: share of the search in which only the pairs are trained.
        logit_lr: learning rate of the logits; their other settings are those of differentiable architecture search.
    """

    low_rank = True
    kind = "gated"
    source = "abstract"
    steps_to_train = 24  # in the search pairs, logits and pairs again must have had their turn, and after it the pairs in use
    formula = "r (m + n)"
    advice = "it is not known which of q, k, v, out and the MLP deserve a LoRA."

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        rho: float = 0.5,
        scope: Literal["layer", "global"] = "layer",
        sharing: bool = True,
        relaxation: Literal["sigmoid", "softmax"] = "sigmoid",
        search: float = 0.25,
        warm_up: float = 0.1,
        logit_lr: float = 1e-2,
    ) -> None:
        if not 0 <= rho <= 1:
            raise UserError(f"adapter.method.rho: {rho} is not in [0, 1]")
        if scope not in ("layer", "global"):
            raise UserError(f"adapter.method.scope: {scope!r} is not one of layer, global")
        if relaxation not in ("sigmoid", "softmax"):
            raise UserError(f"adapter.method.relaxation: {relaxation!r} is not one of sigmoid, softmax")
        if not 0 < search < 1:
            raise UserError(f"adapter.method.search: {search} is not in (0, 1)")
        if not 0 <= warm_up < 1:
            raise UserError(f"adapter.method.warm_up: {warm_up} is not in [0, 1)")
        if logit_lr <= 0:
            raise UserError(f"adapter.method.logit_lr: {logit_lr} is not positive")
        self.rank, self.alpha, self.dropout = rank, alpha, require_dropout(dropout)
        self.rho, self.scope, self.sharing, self.relaxation = rho, scope, sharing, relaxation
        self.search, self.warm_up, self.logit_lr = search, warm_up, logit_lr
        self.scale = scale_of(alpha, rank, "rank")

    def shared(self, sites: Sequence[Site]) -> DiffoRAShared:
        return DiffoRAShared(sites, self.relaxation)

    def adapter(self, site: Site, shared: DiffoRAShared) -> DiffoRAAdapter:
        return DiffoRAAdapter(site, self.rank, self.scale, self.dropout, shared)

    def adjust_gradients(self, adapters: Mapping[str, DiffoRAAdapter], shared: DiffoRAShared, clock: Clock) -> None:
        # without a gradient the optimizer passes a tensor over, moments and decay included
        if self._trains_logits(clock.step, clock.total):
            for adapter in adapters.values():
                adapter.A.grad = adapter.B.grad = None
        else:
            shared.logits.grad = None
            used = set(shared.pair.tolist())
            for adapter in adapters.values():
                if adapter.number not in used:
                    adapter.A.grad = adapter.B.grad = None

    def coordinate(self, adapters: Mapping[str, DiffoRAAdapter], shared: DiffoRAShared, clock: Clock) -> None:
        if clock.step < self._search_steps(clock.total) or not shared.searching:
            return
        shared.select(self.rho, self.scope, self.sharing)
        for number in set(shared.pair.tolist()) - {-1}:
            used = shared.members[number]
            used.restart()
            if clock.optimizer is not None:
                for weight in (used.A, used.B):
                    clock.optimizer.state.pop(weight, None)  # moments of the search

    def _search_steps(self, total: int) -> int:
        return math.ceil(round(self.search * total, 6))

    def _trains_logits(self, done: int, total: int) -> bool:
        steps = self._search_steps(total)
        warm = math.ceil(round(self.warm_up * steps, 6))
        return warm <= done < steps and (done - warm) % 2 == 0

    def param_groups(self, adapters: Mapping[str, DiffoRAAdapter], shared: DiffoRAShared, lr: float) -> list[dict[str, Any]]:
        pairs = [weight for adapter in adapters.values() for weight in (adapter.A, adapter.B)]
        logits = {"params": [shared.logits], "name": "logits", "lr": self.logit_lr, "weight_decay": 1e-3, "betas": (0.5, 0.999)}
        return [{"params": pairs, "name": "adapter"}, logits]

    def count(self, site: Site) -> int:
        return self.rank * sum(site.matrix_shape)


def layer_and_type(name: str) -> tuple[str, str]:
    """`vision.3.attn.q` -> (`vision.3`, `vision.#.attn.q`): the layer ends with the last number that something follows."""
    numbered = re.match(r"(?:.*\.)?\d+(?=\.)", name)
    layer = numbered[0] if numbered else ""
    return layer, re.sub(r"(?<![^.])\d+(?![^.])", "#", layer) + name[len(layer) :]
