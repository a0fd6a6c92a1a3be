"""From image features to class scores: a linear layer, prototypes by cosine, or CLIP's text features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from vision_peft.backbones.base import Backbone
from vision_peft.errors import UserError

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of a linear probe, the choices
WITHOUT_VALIDATION = 0.1


class Head(nn.Module, ABC):
    """Maps features (B, D) to logits (B, C). build() is called once, with the backbone loaded and the data set up."""

    needs_features = False  # whether build() wants the frozen features of the training pictures
    needs_held_out = False  # and those of the validation pictures beside them

    @abstractmethod
    def build(self, backbone: Backbone, prompts: Sequence[str], frozen: FrozenFeatures | None) -> None:
        """Create the parameters.

        Args:
            prompts: one sentence a class; their number is the number of classes.
            frozen: of the training pictures (and the held-out ones), where needs_features asks for them; None when nothing is trained.
        """

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor: ...


class FrozenFeatures:
    """Features (N, D) of the frozen backbone and their labels (N,): what a head may start from.

    Args:
        held_out: features (M, D) and labels (M,) of the validation pictures, by which the strength of a probe is chosen; None: no such.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int, held_out: tuple[Tensor, Tensor] | None = None) -> None:
        self.features, self.labels, self.classes = features.float().cpu(), labels.cpu(), classes
        self.held_out = None if held_out is None else (held_out[0].float().cpu(), held_out[1].cpu())

    def means(self) -> Tensor:
        """Class means (C, D)."""
        counts = torch.bincount(self.labels, minlength=self.classes).clamp(min=1)
        return torch.zeros(self.classes, self.features.shape[1]).index_add_(0, self.labels, self.features) / counts[:, None]

    def nearest_mean(self) -> tuple[Tensor, Tensor]:
        """W (C, D), b (C,) of the classifier of Gaussian classes with one common variance, with logits of moderate size."""
        means, seen = self.means(), self.labels.unique()
        variance = (self.features - means[self.labels]).square().mean().clamp(min=1e-8)
        centre = means[seen].mean(0)
        # the D values of a feature are correlated: taken as independent they would give logits in the hundreds
        slopes = (means - centre)[seen] / (variance * self.features.shape[1] ** 0.5)
        weight, bias = torch.zeros_like(means), torch.full((self.classes,), -1e2)  # a class without pictures is never predicted
        weight[seen], bias[seen] = slopes, -(slopes * (means[seen] + centre)).sum(1) / 2
        return weight, bias

    def logistic_regression(self, strength: float | None = None) -> tuple[Tensor, Tensor]:
        """W (C, D), b (C,) of multinomial logistic regression on centred features of unit scale, l2-regularised by 1 / strength.

        One scale for all features: a few pictures say little about the spread of each, and a rarely active one would be divided by
        whatever spread it happens to have.

        Args:
            strength: above 0; None chooses from STRENGTHS by the accuracy on the held-out pictures, the smallest of equals.
        """
        if strength is not None:
            return next(self._regressions([strength]))
        if self.held_out is None:
            rank_zero_info(f"linear probe: no validation pictures to choose its strength by; taking {WITHOUT_VALIDATION}")
            return self.logistic_regression(WITHOUT_VALIDATION)
        features, labels = self.held_out
        found = list(self._regressions(STRENGTHS))
        accuracies = [(F.linear(features, *weights).argmax(1) == labels).float().mean().item() for weights in found]
        best = max(range(len(found)), key=accuracies.__getitem__)
        rank_zero_info(f"linear probe: strength {STRENGTHS[best]} has the best validation accuracy, {accuracies[best]:.4f}")
        return found[best]

    def _regressions(self, strengths: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """One (W, b) a strength; each solve starts from the one before, so ascending strengths are quick."""
        from sklearn.linear_model import LogisticRegression

        mean = self.features.mean(0)
        scale = (self.features - mean).square().mean().sqrt().clamp(min=1e-6)
        solver = LogisticRegression(max_iter=500, warm_start=True)
        for strength in strengths:
            solver.set_params(C=strength).fit(((self.features - mean) / scale).numpy(), self.labels.numpy())
            weight, bias = torch.zeros(self.classes, self.features.shape[1]), torch.full((self.classes,), -1e2)
            seen = torch.from_numpy(solver.classes_)
            coefficients, intercept = torch.from_numpy(solver.coef_).float(), torch.from_numpy(solver.intercept_).float()
            if len(seen) == 2:  # scikit-learn gives one row for two classes
                coefficients, intercept = torch.cat([-coefficients, coefficients]) / 2, torch.cat([-intercept, intercept]) / 2
            weight[seen] = coefficients / scale
            bias[seen] = intercept - (coefficients / scale) @ mean
            yield weight, bias


class LinearHead(Head):
    """logits = W f + b, W (C, D).

    Args:
        init: `zeros`; `class_means`, the nearest-class-mean classifier; `linear_probe`, logistic regression on the frozen features,
            so that training starts where a linear probe ends (Kumar et al., "Fine-Tuning can Distort Pretrained Features", 2022).
        strength: inverse l2 weight of the linear probe, above 0; null chooses it by the accuracy on the validation pictures.
    """

    def __init__(self, init: Literal["zeros", "class_means", "linear_probe"] = "linear_probe", strength: float | None = None) -> None:
        super().__init__()
        if strength is not None and strength <= 0:
            raise UserError(f"model.head.strength: must be above 0 or null, not {strength}")
        self.init, self.strength = init, strength
        self.needs_features = init != "zeros"
        self.needs_held_out = init == "linear_probe" and strength is None

    def build(self, backbone: Backbone, prompts: Sequence[str], frozen: FrozenFeatures | None) -> None:
        self.weight = nn.Parameter(torch.zeros(len(prompts), backbone.num_features))
        self.bias = nn.Parameter(torch.zeros(len(prompts)))
        if frozen is not None:
            weight, bias = frozen.nearest_mean() if self.init == "class_means" else frozen.logistic_regression(self.strength)
            with torch.no_grad():
                self.weight.copy_(weight)
                self.bias.copy_(bias)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


class CosineHead(Head):
    """logits = scale * cos(f - c, p), with one trained prototype p (D,) a class, started at the class means; c is the mean of all.

    Args:
        scale: factor of the cosine.
    """

    needs_features = True

    def __init__(self, scale: float = 20.0) -> None:
        super().__init__()
        self.scale = scale

    def build(self, backbone: Backbone, prompts: Sequence[str], frozen: FrozenFeatures | None) -> None:
        self.register_buffer("centre", torch.zeros(backbone.num_features) if frozen is None else frozen.means().mean(0))
        start = torch.zeros(len(prompts), backbone.num_features) if frozen is None else F.normalize(frozen.means() - self.centre, dim=1)
        self.prototypes = nn.Parameter(start.clone())

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(features - self.centre, dim=1) @ F.normalize(self.prototypes, dim=1).mT


class TextHead(Head):
    """logits = scale * cos(image feature, text feature of the class's prompt): CLIP's own classifier; has no parameters.

    The text features are recomputed, with gradients, while layers of the text tower are adapted, and computed once otherwise.

    Args:
        scale: factor of the cosine; 100 as in the few-shot protocols, `learned` for the one the model was trained with.
    """

    def __init__(self, scale: float | Literal["learned"] = 100.0) -> None:
        super().__init__()
        self.scale = scale

    def build(self, backbone: Backbone, prompts: Sequence[str], frozen: FrozenFeatures | None) -> None:
        if not hasattr(backbone, "text_features"):
            raise UserError(f"model.head: TextHead needs a backbone with a text tower; {type(backbone).__name__} has none")
        object.__setattr__(self, "backbone", backbone)  # not a child: the task owns it
        self.prompts = list(prompts)

    def forward(self, features: Tensor) -> Tensor:
        frozen = not any(target.partition(".")[0] == "text" for target in self.backbone.adapted)
        text = self.backbone.text_features(self.prompts, frozen).to(features.device)
        scale = self.backbone.learned_scale() if self.scale == "learned" else self.scale
        return scale * F.normalize(features, dim=1) @ F.normalize(text, dim=1).mT.to(features.dtype)
