"""Gates that reach zero exactly: soft thresholding, hard-concrete random gates, and chains of gates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# of Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", as Bayesian Bits uses them
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
CLOSED = 0.34  # a gate counts as closed in evaluation if it is zero with at least this probability
_SHIFT = TEMPERATURE * math.log(-LOW / HIGH)  # -1.5986


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """T(x) = sign(x) max(|x| - threshold, 0), the proximal map of threshold * ||x||_1."""
    return x.sign() * (x.abs() - threshold).clamp(min=0)


def shrink_then_cut(x: Tensor, threshold: float) -> Tensor:
    """What the official codes of SoRA and CoDyRA do instead: entries beyond the threshold shrink by it, then what is below it is cut.

    So 0 for |x| < 2 threshold and the soft threshold from there on, except that an entry of exactly the threshold stays as it is.
    """
    shrunk = torch.where(x.abs() > threshold, x - threshold * x.sign(), x)
    return torch.where(shrunk.abs() < threshold, torch.zeros_like(x), shrunk)


def sample_gates(phi: Tensor) -> Tensor:
    """Hard-concrete gates in [0, 1], exactly 0 and 1 with positive probability; draws from the global generator.

    z = clamp(sigmoid((log u - log(1 - u) + phi) / temperature) * (high - low) + low, 0, 1) with u ~ U(0, 1).
    """
    tiny = torch.finfo(phi.dtype).eps
    u = torch.rand_like(phi).clamp(tiny, 1 - tiny)
    return (torch.sigmoid((torch.logit(u) + phi) / TEMPERATURE) * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(phi: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(phi - temperature * log(-low / high)) = sigmoid(phi + 1.5986)."""
    return torch.sigmoid(phi - _SHIFT)


def settled_gates(phi: Tensor) -> Tensor:
    """The gates of evaluation, 0 or 1: open where P(z = 0) < 0.34, that is phi > -0.935. Has no gradient."""
    return (open_probability(phi.detach()) > 1 - CLOSED).to(phi.dtype)


def nested(gates: Tensor) -> Tensor:
    """Running products along the last dimension: a gate acts only as far as all before it are open, so the open ones form a prefix."""
    return gates.cumprod(-1)
