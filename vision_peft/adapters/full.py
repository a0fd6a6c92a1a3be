"""Full fine-tuning: every tensor of the targeted layers is trained.

    W' = W + D,    D of W's shape, zero at the start

m n numbers a weight, biases, norms, tokens and position tables included. Kept in offset form, so that adapters off gives the
pretrained network, weight decay pulls towards it, and the run folder holds what was trained and nothing else. It costs the
network's size once more in memory against training in place.
"""

from __future__ import annotations

from math import prod

from torch import nn

from vision_peft.adapters._offset import OffsetAdapter
from vision_peft.engine.adapter import Method
from vision_peft.engine.site import Site


class Full(Method):
    """Full fine-tuning of the targeted layers; has no hyper-parameters."""

    roles = ("weight", "bias", "other")
    kind = "dense"
    formula = "m n"
    advice = "data is plentiful, or as the upper baseline; the file is as large as what it adapts."

    def __init__(self) -> None: ...

    def adapter(self, site: Site, shared: nn.Module | None) -> OffsetAdapter:
        return OffsetAdapter(site)

    def count(self, site: Site) -> int:
        return prod(site.shape)
