"""A trained offset of the tensor itself: what full fine-tuning and BitFit share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Evidence
from vision_peft.engine.site import Site


class OffsetAdapter(Adapter):
    """W' = W + D with D = 0 at the start, of W's own shape."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros(site.matrix_shape))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.D.zero_()

    def weight(self, W: Tensor) -> Tensor:
        return W + self.D
