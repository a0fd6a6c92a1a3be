"""Low-rank experts behind a router, which sees each token and sends it to a few of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Evidence
from vision_peft.errors import UserError
from vision_peft.linalg.init import kaiming_rows_


class ExpertsAdapter(Adapter):
    """y = W x + b + s sum_j g_j(x) B_j A_j x, with gates g = softmax of the k largest entries of R x, zero for the other experts.

    A (E d, n) and B (m, E d) hold the experts as blocks of d ranks. R (E, n) is left out where there is one expert.

    The balance loss  c E sum_j f_j p_j  (f_j: share of the tokens sent to j, p_j: its mean probability) needs the routing of the last
    forward pass. What is kept of it is the loss and its gradient in R, both without a graph: a graph would outlive the step under
    gradient checkpointing, which runs the forward pass again inside the backward pass, and could be neither copied nor pickled.
    So the balance loss trains the router alone, not what lies before it.
    """

    R: nn.Parameter | None

    def __init__(self, out: int, columns: int, experts: int, width: int, top_k: int, balance: float, dropout: float) -> None:
        super().__init__()
        self.experts, self.width, self.top_k, self.balance, self.dropout = experts, width, top_k, balance, dropout
        self.scale = 1.0
        self.A = nn.Parameter(torch.zeros(experts * width, columns))
        self.B = nn.Parameter(torch.zeros(out, experts * width))
        self.R = nn.Parameter(torch.zeros(experts, columns)) if experts > 1 else None
        self.routing: tuple[Tensor, Tensor] | None = None  # balance loss and its gradient in R, of the last forward pass

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        if self.R is not None:
            kaiming_rows_(self.R, evidence.generator)

    def gates(self, x: Tensor) -> Tensor | None:
        """Gates (..., E) in float32, whatever the type of x (..., n); None for a single expert."""
        if self.R is None:
            return None
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.R)
            best, chosen = logits.topk(self.top_k, dim=-1)
            gates = torch.zeros_like(logits).scatter(-1, chosen, best.softmax(-1))
            if self.training and self.balance > 0:
                self.routing = self._balance(x.detach(), logits.detach(), chosen)
            return gates

    @torch.no_grad()
    def _balance(self, x: Tensor, logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        p = logits.softmax(-1).flatten(0, -2)  # (tokens, E)
        f = F.one_hot(chosen.flatten(), self.experts).float().mean(0)
        coefficient = self.balance * self.experts
        loss = coefficient * (f @ p.mean(0))
        slope = coefficient / len(p) * p * (f - (p @ f)[:, None])  # of the loss in the logits: f is a count, without a gradient
        return loss, slope.mT @ x.flatten(0, -2).float()

    def penalty(self) -> Tensor | float:
        if self.routing is None:
            return 0.0
        (loss, gradient), self.routing = self.routing, None
        return loss + (gradient * (self.R - self.R.detach())).sum()  # its value is the loss, its gradient in R the loss's

    def branch(self, x: Tensor) -> Tensor:
        """s sum_j g_j B_j A_j x, (..., m)."""
        low, gates = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype)), self.gates(x)  # (..., E d), (..., E)
        if gates is not None:
            low = low * gates.repeat_interleave(self.width, dim=-1).to(low.dtype)
        return F.linear(low, (self.scale * self.B).to(x.dtype))

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, W, b) + self.branch(x)


def require_routing(experts: int, top_k: int, balance: float) -> None:
    """UserError where the router could not work: it learns from the gates of two experts or more."""
    if experts < 1:
        raise UserError(f"adapter.method.experts: {experts} is not positive")
    if top_k > experts or (experts > 1 and top_k < 2) or top_k < 1:
        raise UserError(f"adapter.method.top_k: {top_k} is not between {min(2, experts)} and the number of experts, {experts}")
    if balance < 0:
        raise UserError(f"adapter.method.balance: {balance} is negative")
