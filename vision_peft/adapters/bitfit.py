"""BitFit: only the biases of the targeted layers are trained.

    b' = b + d,    d (m,) = 0 at the start

m numbers a layer that has a bias, norms included where the pattern covers them; every weight is frozen. The offset form keeps
the pretrained bias untouched, so weight decay pulls towards it and the adapter can be switched off.

Source: Ben Zaken, Goldberg, Ravfogel, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", ACL 2022.
"""

from __future__ import annotations

from torch import nn

from vision_peft.adapters._offset import OffsetAdapter
from vision_peft.engine.adapter import Method
from vision_peft.engine.site import Site


class BitFit(Method):
    """Bias-only fine-tuning; has no hyper-parameters."""

    roles = ("bias",)
    kind = "bias"
    formula = "m"
    advice = "a few thousand numbers must do, or as the cheapest baseline after the linear probe."

    def __init__(self) -> None: ...

    def adapter(self, site: Site, shared: nn.Module | None) -> OffsetAdapter:
        return OffsetAdapter(site)

    def count(self, site: Site) -> int:
        return site.matrix_shape[0]
