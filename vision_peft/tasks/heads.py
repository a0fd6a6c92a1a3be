"""From image features to class scores: a linear layer, prototypes by cosine, or CLIP's text features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.backbones.base import Backbone
from vision_peft.errors import UserError


class Head(nn.Module, ABC):
    """Maps features (B, D) to logits (B, C). build() is called once, with the backbone loaded and the data set up."""

    needs_means = False  # whether build() wants the class means of the training features

    @abstractmethod
    def build(self, backbone: Backbone, prompts: Sequence[str], means: ClassMeans | None) -> None:
        """Create the parameters.

        Args:
            prompts: one sentence a class; their number is the number of classes.
            means: of the training features, where needs_means asks for them; None when there is no training data (test).
        """

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor: ...


class ClassMeans:
    """First and second moments of the training features, by class.

    Attributes:
        means: (C, D).
        variance: mean squared deviation of one feature value from its class mean, averaged over values.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        counts = torch.bincount(labels, minlength=classes).clamp(min=1)
        self.means = torch.zeros(classes, features.shape[1]).index_add_(0, labels, features) / counts[:, None]
        self.variance = float((features - self.means[labels]).square().mean())


class LinearHead(Head):
    """logits = W f + b, W (C, D).

    Args:
        init: `zeros`, or `class_means`: the nearest-class-mean classifier of Gaussian classes with one common variance.
    """

    def __init__(self, init: Literal["zeros", "class_means"] = "zeros") -> None:
        super().__init__()
        self.init = init
        self.needs_means = init == "class_means"

    def build(self, backbone: Backbone, prompts: Sequence[str], means: ClassMeans | None) -> None:
        self.weight = nn.Parameter(torch.zeros(len(prompts), backbone.num_features))
        self.bias = nn.Parameter(torch.zeros(len(prompts)))
        if means is not None:
            centred = means.means - means.means.mean(0)
            with torch.no_grad():
                self.weight.copy_(centred / max(means.variance, 1e-8))
                self.bias.copy_(-(self.weight * (means.means + means.means.mean(0))).sum(1) / 2)
                # features have D correlated values: without this the first logits are in the hundreds
                shrink = backbone.num_features**0.5
                self.weight.div_(shrink)
                self.bias.div_(shrink)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


class CosineHead(Head):
    """logits = scale * cos(f - c, p), with one trained prototype p (D,) a class, started at the class means; c is the mean of all.

    Args:
        scale: factor of the cosine.
    """

    needs_means = True

    def __init__(self, scale: float = 20.0) -> None:
        super().__init__()
        self.scale = scale

    def build(self, backbone: Backbone, prompts: Sequence[str], means: ClassMeans | None) -> None:
        self.register_buffer("centre", torch.zeros(backbone.num_features) if means is None else means.means.mean(0))
        start = torch.zeros(len(prompts), backbone.num_features) if means is None else F.normalize(means.means - self.centre, dim=1)
        self.prototypes = nn.Parameter(start.clone())

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(features - self.centre, dim=1) @ F.normalize(self.prototypes, dim=1).mT


class TextHead(Head):
    """logits = scale * cos(image feature, text feature of the class's prompt): CLIP's own classifier; has no parameters.

    The text features are recomputed, with gradients, while layers of the text tower are adapted, and computed once otherwise.

    Args:
        scale: factor of the cosine; 100 as in the few-shot protocols.
    """

    def __init__(self, scale: float = 100.0) -> None:
        super().__init__()
        self.scale = scale

    def build(self, backbone: Backbone, prompts: Sequence[str], means: ClassMeans | None) -> None:
        if not hasattr(backbone, "text_features"):
            raise UserError(f"model.head: TextHead needs a backbone with a text tower; {type(backbone).__name__} has none")
        object.__setattr__(self, "backbone", backbone)  # not a child: the task owns it
        self.prompts = list(prompts)

    def forward(self, features: Tensor) -> Tensor:
        frozen = not any(target.partition(".")[0] == "text" for target in self.backbone.adapted)
        text = self.backbone.text_features(self.prompts, frozen).to(features.device)
        return self.scale * F.normalize(features, dim=1) @ F.normalize(text, dim=1).mT.to(features.dtype)
