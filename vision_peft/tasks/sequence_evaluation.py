"""Zero-shot accuracy of one vision-language model on all sets of a sequence, with and without knowing which set a picture is from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_peft.backbones.two_towers import TwoTowers
from vision_peft.errors import UserError


class Accuracies(NamedTuple):
    """Top-1 on each test split, in [0, 1], in the order of the sets."""

    known: list[float]  # among the classes of the picture's own set (MTIL)
    union: list[float]  # among the classes of all sets (X-TAIL); of equal scores the first class counts


@torch.inference_mode()
def evaluate(
    backbone: TwoTowers,
    sets: Mapping[str, Any],
    device: torch.device,
    precision: Callable[[], AbstractContextManager],
    progress: Callable[[str], None] | None = None,
) -> Accuracies:
    """One pass over each test split gives both measures. Text features are computed in full precision.

    Args:
        backbone: loaded; in eval mode afterwards.
        sets: by name, data modules whose class names and template make the prompts.
        precision: makes the context of each of the image tower's forward passes, such as autocast.
        progress: called with the name of each set as it begins.
    """
    if not isinstance(backbone, TwoTowers):
        raise UserError(f"a sequence needs a backbone with a text tower; {type(backbone).__name__} has none")
    backbone.to(device).eval()
    texts = {name: F.normalize(backbone.text_features(data.prompts(), frozen=True).float(), dim=1) for name, data in sets.items()}
    union, start = torch.cat(list(texts.values())), 0
    found = Accuracies([], [])
    for name, data in sets.items():
        if progress is not None:
            progress(name)
        data.preprocess = backbone.preprocess
        data.setup("test")
        stop, right = start + len(texts[name]), torch.zeros(2)
        for images, labels in data.test_dataloader():
            with precision():
                features = backbone(images.to(device)).float()
            scores = F.normalize(features, dim=1) @ union.mT
            right[0] += _hits(scores[:, start:stop], labels.to(device))
            right[1] += _hits(scores, labels.to(device) + start)
        for values, count in zip(found, right.tolist()):
            values.append(count / len(data.test_records))
        start = stop
    return found


def _hits(scores: Tensor, labels: Tensor) -> int:
    return int((scores.argmax(1) == labels).sum())
