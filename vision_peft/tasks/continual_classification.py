"""One task of a sequence on the same vision-language model: classify its classes, and keep its images close to their own texts.

    L   = L_i + L_t            L_t only while the image tower is adapted
    L_i = mean_n  CE(softmax_c(s z_n E_c), y_n)                       c over the classes of this task
    L_t = mean_c  sum_{n: y_n = c}  -log softmax_n(s E_c z_n)          c over these and the classes of earlier tasks

z (B, D) and E (C, D) are unit vectors of the batch's images and of the classes' prompts, s the factor of the cosine. In L_i the columns of
earlier classes are masked; in L_t their rows hold no image of the batch and add nothing to the sum, so all that remains of the earlier
classes is their number, by which the mean is taken. Source: CoDyRA, arXiv 2412.01004 (code).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vision_peft.errors import UserError
from vision_peft.tasks.fewshot_classification import FewShotClassification


class ContinualClassification(FewShotClassification):
    """See FewShotClassification; the head is one whose scores are s z E^T, such as TextHead.

    Args:
        seen_classes: of the tasks before this one; `vision-peft continual` counts them.
    """

    def __init__(self, *args: Any, seen_classes: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if seen_classes < 0:
            raise UserError(f"model.seen_classes: must be at least 0, not {seen_classes}")
        self.seen_classes = seen_classes

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        logits = self._logits(inputs)  # (B, C)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if not any(target.startswith("vision.") for target in self.backbone.adapted):
            return loss
        towards_images = logits.float().log_softmax(0).gather(1, labels[:, None])
        return loss - towards_images.sum() / (self.seen_classes + logits.shape[1])
