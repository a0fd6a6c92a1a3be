"""Importance of trained entries, a budget that falls over the run, and its division: what AdaLoRA and SNELLA share.

    I = |p dL/dp|,    mean <- beta1 mean + (1 - beta1) I,    deviation <- beta2 deviation + (1 - beta2) |I - mean|

with the mean already updated; score = mean * deviation. Both averages start at zero. p is taken after the optimizer's step and the
gradient before it, as the authors' programs do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.errors import UserError


class Sensitivity(nn.Module):
    """The two moving averages of one trained tensor, as buffers, so that a resumed run goes on with them."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, shape: tuple[int, ...], beta1: float, beta2: float) -> None:
        super().__init__()
        self.beta1, self.beta2 = beta1, beta2
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.zeros(shape))

    def update(self, parameter: Tensor) -> None:
        """One optimizer step; a tensor without a gradient leaves the averages as they are."""
        if parameter.grad is None:
            return
        own = torch.nan_to_num((parameter * parameter.grad).abs(), nan=0.0)
        self.mean.lerp_(own, 1 - self.beta1)
        self.deviation.lerp_((own - self.mean).abs(), 1 - self.beta2)

    def score(self) -> Tensor:
        return self.mean * self.deviation


def require_beta(key: str, beta: float) -> float:
    """The decay of a moving average; UserError outside (0, 1)."""
    if not 0 < beta < 1:
        raise UserError(f"adapter.method.{key}: {beta} is not in (0, 1)")
    return beta


def cubic_budget(step: int, total: int, initial: float, target: float, warmup: int, final: int) -> float:
    """`initial` for `warmup` steps, `target` for the last `final`, between them a whole number that falls with the cube of what is left."""
    if step <= warmup:
        return initial
    if step > total - final:
        return target
    left = 1 - (step - warmup) / (total - final - warmup)
    return int(target + (initial - target) * left**3)


def keep_highest(scores: list[Tensor], budget: int) -> list[Tensor]:
    """Masks of the `budget` highest entries of all the vectors together; of equal scores the earlier ones are kept."""
    order = torch.cat(scores).argsort(descending=True, stable=True)
    kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    kept[order[:budget]] = True
    return list(kept.split([len(each) for each in scores]))


def divide(total: float, scores: Tensor, caps: Tensor) -> Tensor:
    """Whole numbers (L,) in proportion to `scores` (L,), none above its cap (L,), with sum min(int(total), sum of caps).

    What a capped share leaves over goes to the others, again in proportion. The fractions are rounded by largest remainder.
    Scores that are all zero are equal scores. Everything runs in float64 on the CPU, the same on every process.
    """
    scores, caps = scores.double().cpu(), caps.cpu()
    whole = min(int(total), int(caps.sum()))
    shares, open_ = torch.zeros_like(scores), torch.ones_like(scores, dtype=torch.bool)
    while open_.any():
        weights = scores * open_
        weights = weights if weights.sum() > 0 else open_.double()
        wanted = (whole - shares[~open_].sum()) * weights / weights.sum()
        full = open_ & (wanted >= caps)
        shares = torch.where(open_, wanted, shares)
        if not full.any():
            break
        shares[full] = caps[full].double()
        open_ = open_ & ~full
    parts = (shares + 1e-9).floor().long().clamp(min=0).minimum(caps)
    rest = (shares - parts).masked_fill(parts >= caps, -1.0)
    parts[rest.argsort(descending=True, stable=True)[: whole - int(parts.sum())]] += 1
    return parts
