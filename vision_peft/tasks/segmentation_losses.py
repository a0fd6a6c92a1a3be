"""Losses of segmentation, by MONAI where it has them. Logits (B, K, h, w), targets int64 (B, h, w); K = 1 is one target, else classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CERTAIN = 30.0


class SegmentationLoss(ABC):
    """A scalar of logits and targets. Pixels that do not count are given the right answer beforehand, see `settle`."""

    @abstractmethod
    def __call__(self, logits: Tensor, target: Tensor) -> Tensor: ...


def settle(logits: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets in which pixels outside `valid` (B, h, w) are background, and surely so: they add nothing to any loss."""
    outside = ~valid[:, None]
    if logits.shape[1] == 1:
        return logits.masked_fill(outside, -CERTAIN), target.masked_fill(~valid, 0)
    sure = torch.zeros(logits.shape[1], dtype=logits.dtype, device=logits.device)
    sure[0] = CERTAIN
    return torch.where(outside, sure[None, :, None, None], logits), target.masked_fill(~valid, 0)


class DiceCE(SegmentationLoss):
    """lambda_dice Dice + lambda_ce cross-entropy (binary where K = 1), by monai.losses.DiceCELoss.

    MedSAM: `squared: true`. SAMed: `squared: true, batch: true, lambda_dice: 0.8, lambda_ce: 0.2, smooth: 1e-5`.

    Args:
        squared: squares in Dice's denominator.
        batch: one Dice over the batch instead of one an image.
        background: whether the background of a semantic head is a class of Dice.
        smooth: added to numerator and denominator.
    """

    def __init__(
        self,
        lambda_dice: float = 1.0,
        lambda_ce: float = 1.0,
        squared: bool = False,
        batch: bool = False,
        background: bool = True,
        smooth: float = 1.0,
    ) -> None:
        self.options = {"lambda_dice": lambda_dice, "lambda_ce": lambda_ce, "squared_pred": squared, "batch": batch}
        self.options |= {"smooth_nr": smooth, "smooth_dr": smooth}
        self.background = background

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        from monai.losses import DiceCELoss

        several = logits.shape[1] > 1
        kind = {"softmax": True, "to_onehot_y": True, "include_background": self.background} if several else {"sigmoid": True}
        return DiceCELoss(**kind, **self.options)(logits, _channel(logits, target))


class DiceFocal(SegmentationLoss):
    """lambda_dice Dice + lambda_focal focal loss, by monai.losses.DiceFocalLoss. SAM-Med2D: `lambda_focal: 20, alpha: 0.25`.

    Args:
        gamma: exponent of the focal loss.
        alpha: weight of the foreground in it; null: none.
    """

    def __init__(
        self, lambda_dice: float = 1.0, lambda_focal: float = 1.0, gamma: float = 2.0, alpha: float | None = None, batch: bool = False
    ) -> None:
        self.options = {"lambda_dice": lambda_dice, "lambda_focal": lambda_focal, "gamma": gamma, "alpha": alpha, "batch": batch}

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        from monai.losses import DiceFocalLoss

        kind = {"softmax": True, "to_onehot_y": True} if logits.shape[1] > 1 else {"sigmoid": True}
        return DiceFocalLoss(**kind, smooth_nr=1.0, smooth_dr=1.0, **self.options)(logits, _channel(logits, target))


class SaltLoss(SegmentationLoss):
    """SALT's: Dice over the whole batch with smoothing 1, plus focal loss with alpha 0.75 and gamma 3; one target only.

    Args:
        variant: `paper` takes the cross-entropy of logits; `official` that of probabilities taken for logits, as the released code does.
    """

    def __init__(self, alpha: float = 0.75, gamma: float = 3.0, variant: Literal["paper", "official"] = "paper") -> None:
        self.alpha, self.gamma, self.variant = alpha, gamma, variant

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        M = _channel(logits, target).float()
        P = logits.float().sigmoid()
        dice = 1 - (2 * (P * M).sum() + 1) / (P.sum() + M.sum() + 1)
        ce = F.binary_cross_entropy_with_logits(logits.float() if self.variant == "paper" else P, M, reduction="none")
        right = P * M + (1 - P) * (1 - M)
        weight = self.alpha * M + (1 - self.alpha) * (1 - M)
        return dice + (weight * (1 - right) ** self.gamma * ce).mean()


class DiceClDice(SegmentationLoss):
    """(1 - share) (Dice + cross-entropy) + share clDice, the overlap of soft skeletons (Shit et al., CVPR 2021); for one target.

    Args:
        share: of clDice, in [0, 1].
        iterations: of the soft skeleton; at least half the width of the widest structure in pixels.
    """

    def __init__(self, share: float = 0.3, iterations: int = 5) -> None:
        self.share, self.iterations = share, iterations
        self.plain = DiceCE()

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        from monai.losses import SoftclDiceLoss

        overlap = SoftclDiceLoss(iter_=self.iterations)(_channel(logits, target).float(), logits.float().sigmoid())
        return (1 - self.share) * self.plain(logits, target) + self.share * overlap


def _channel(logits: Tensor, target: Tensor) -> Tensor:
    """(B, 1, h, w) in the logits' type where there is one target."""
    return target[:, None].to(logits.dtype) if logits.shape[1] == 1 else target[:, None]
