"""Tip-Adapter: CLIP's zero-shot scores and a cache of the shots' features, without training or with its keys trained.

    logits = s f T^T + alpha exp(-beta (1 - f K^T)) V

f (B, D) image features, T (C, D) text features of the prompts, K (N, D) features of the N training pictures, all of unit length;
V (N, C) their labels, one-hot; s = 100. alpha and beta are those with the best accuracy on the validation pictures. With `train_keys`
K is trained (Tip-Adapter-F).

Source: Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", 2022. Differences: keys are features of
the pictures as evaluation sees them, where the authors average ten augmented views; alpha and beta are searched before the keys are
trained and kept, where the authors search again; the grid has 50 values of beta, where theirs has 200.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from vision_peft.backbones.base import Backbone
from vision_peft.errors import UserError
from vision_peft.tasks.heads import FrozenFeatures, Head, TextHead

ALPHAS, BETAS = torch.linspace(0.1, 3.0, 20), torch.linspace(0.1, 7.0, 50)
WITHOUT_VALIDATION = (1.0, 1.0)  # the paper's values for ImageNet are 1.17 and 1
ROWS = 500  # pictures whose similarities to all keys are held at once in the search


class TipAdapterHead(Head):
    """Needs a backbone with a text tower, without adapters on it.

    Args:
        alpha: weight of the cache, at least 0; null searches.
        beta: sharpness of the similarity, above 0; null searches.
        train_keys: train K (Tip-Adapter-F), N * D numbers.
        scale: s.
    """

    needs_features = True

    def __init__(self, alpha: float | None = None, beta: float | None = None, train_keys: bool = False, scale: float = 100.0) -> None:
        super().__init__()
        for key, value, smallest in (("alpha", alpha, 0.0), ("beta", beta, 1e-6)):
            if value is not None and value < smallest:
                raise UserError(f"model.head.{key}: {value} is too small; at least {smallest:g}, or null to search")
        self.given, self.train_keys = (alpha, beta), train_keys
        self.needs_held_out = None in self.given
        self.text = TextHead(scale)

    def build(self, backbone: Backbone, prompts: Sequence[str], frozen: FrozenFeatures | None) -> None:
        self.text.build(backbone, prompts, frozen)
        self.classes = len(prompts)
        features = torch.zeros(0, backbone.num_features) if frozen is None else F.normalize(frozen.features, dim=1)
        self.register_buffer("labels", torch.zeros(0, dtype=torch.long) if frozen is None else frozen.labels.clone())
        self._set_keys(features)
        self.register_buffer("mixture", torch.tensor(WITHOUT_VALIDATION if frozen is None else self._choose(frozen)))

    def forward(self, features: Tensor) -> Tensor:
        if self.text.backbone.adapted:
            raise UserError("model.head: TipAdapterHead keeps features of the frozen backbone: set adapter.method to null")
        alpha, beta = self.mixture
        return self.text(features) + alpha * self.cached(self.similarity(features), beta)

    def similarity(self, features: Tensor) -> Tensor:
        """f K^T (B, N)."""
        return (F.normalize(features, dim=1) @ self.keys.mT.to(features.dtype)).float()

    def cached(self, similarity: Tensor, beta: Tensor | float) -> Tensor:
        """exp(-beta (1 - similarity)) V (B, C); V has a single 1 a row, so its product is a sum by label."""
        affinity = (-beta * (1 - similarity)).exp()
        return affinity.new_zeros(len(affinity), self.classes).index_add(1, self.labels, affinity)

    def take_sizes(self, stored: Mapping[str, Tensor]) -> None:
        """As many keys as a stored state has: their number follows from pictures that evaluation does not read."""
        if "keys" in stored and "labels" in stored:
            self.labels = torch.zeros_like(stored["labels"], device=self.labels.device)
            self._set_keys(torch.zeros_like(stored["keys"], device=self.keys.device))

    def _set_keys(self, keys: Tensor) -> None:
        if self.train_keys:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)

    @torch.no_grad()
    def _choose(self, frozen: FrozenFeatures) -> tuple[float, float]:
        """alpha and beta, those that are given or the first of the best on the held-out pictures."""
        alphas, betas = ([value] if value is not None else grid.tolist() for value, grid in zip(self.given, (ALPHAS, BETAS)))
        if len(alphas) == len(betas) == 1:
            return alphas[0], betas[0]
        if frozen.held_out is None:
            alpha, beta = (default if value is None else value for value, default in zip(self.given, WITHOUT_VALIDATION))
            rank_zero_info(f"Tip-Adapter: no validation pictures to choose by; taking alpha {alpha:g}, beta {beta:g}")
            return alpha, beta
        right = torch.zeros(len(alphas), len(betas))
        for features, labels in zip(*(each.split(ROWS) for each in frozen.held_out)):
            zero_shot, similarity = self.text(features), self.similarity(features)
            for column, beta in enumerate(betas):
                cached = self.cached(similarity, beta)
                for row, alpha in enumerate(alphas):
                    right[row, column] += ((zero_shot + alpha * cached).argmax(1) == labels).sum()
        row, column = divmod(int(right.argmax()), len(betas))
        accuracy = right[row, column].item() / len(frozen.held_out[1])
        rank_zero_info(f"Tip-Adapter: alpha {alphas[row]:.2f}, beta {betas[column]:.2f} have the best validation accuracy, {accuracy:.4f}")
        return alphas[row], betas[column]
