"""What a backbone of segmentation offers beyond features: masks out of them, for a prompt or for none."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from vision_peft.backbones.base import Backbone


@dataclass(frozen=True)
class Prompts:
    """What is asked of B images, one target each; coordinates are pixels (x, y) of the network's input, whose corner is (0, 0).

    Attributes:
        points: (B, N, 2).
        labels: (B, N), 1 on the target, 0 beside it, -1 for no point.
        boxes: (B, 4) as x0, y0, x1, y1.
        masks: logits (B, 1, h, w) of an earlier guess, on the grid of the network's own masks.
        tokens: (B, n, D), embedded already, such as a class name's.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None
    tokens: Tensor | None = None


class Masks(NamedTuple):
    logits: Tensor  # (B, K, h, w): K = 1 for one target, classes + 1 for a semantic head (background first)
    quality: Tensor | None = None  # (B, K), the predicted IoU


class SegmentationBackbone(Backbone):
    """forward() gives the image embedding (B, D, h, w); decode() gives masks of it.

    Attributes:
        classes: foreground classes of a semantic head; None where each pass answers one prompt.
        takes_prompts: whether decode() can use them.
        mask_size: (h, w) of the masks, for inputs of `preprocess.size`.
    """

    classes: int | None = None
    takes_prompts: bool = False
    mask_size: tuple[int, int]

    @abstractmethod
    def decode(self, embedding: Tensor, prompts: Prompts | None = None) -> Masks:
        """Masks of every image of the embedding (B, D, h, w)."""
