"""(IA)3: learned multipliers on the keys, the values and the hidden features of the MLP.

    W' = diag(l) W   (side output, l (m,))        W' = W diag(l)   (side input, l (n,))

`conventional` is the paper's placement: it rescales what the k and v layers put out and what the second layer of the MLP takes in;
aim it at `*.attn.{k,v}` and `*.mlp.fc2`. A bias of the layer is not rescaled, so that the map stays one of the weight alone; rows and
columns are those of the flattened weight. Start: l = 1, so W' = W. Trained: m or n numbers a weight, without weight decay, which
would pull the multipliers to zero and not to one.

Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS 2022; from general
knowledge, checked against the layer of huggingface/peft (which rescales the bias too, on the side of the output).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Evidence, Factored, Method, Shared, trainable
from vision_peft.engine.site import Site
from vision_peft.errors import UserError

Side = Literal["conventional", "output", "input"]


class OutputScaleAdapter(Adapter):
    """W' = diag(l) W."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(site.matrix_shape[0]))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.l.fill_(1.0)

    def weight(self, W: Tensor) -> Tensor:
        return self.l[:, None] * W

    def factored(self, W: Tensor) -> Factored:
        return Factored(W.new_zeros(W.shape[0], 0), W.new_zeros(0, W.shape[1]), self.l)  # no branch: the scale is all


class InputScaleAdapter(Adapter):
    """W' = W diag(l)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(site.matrix_shape[1]))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.l.fill_(1.0)

    def weight(self, W: Tensor) -> Tensor:
        return W * self.l

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear((x * self.l).to(x.dtype), W, b)  # the same map, without a dense weight gradient


class IA3(Method):
    """Infused adapters by inhibiting and amplifying inner activations.

    Args:
        side: `output` or `input` of every adapted layer; `conventional` takes the input where a layer's name ends in `fc2` and the
            output elsewhere.
    """

    kind = "scaling"
    formula = "m (output) or n (input)"
    advice = "the fewest numbers that still touch every layer, a gain for each output."

    def __init__(self, side: Side = "conventional") -> None:
        if side not in ("conventional", "output", "input"):
            raise UserError(f"adapter.method.side: {side!r} is not one of conventional, output, input")
        self.side = side

    def scales_input(self, site: Site) -> bool:
        return self.side == "input" or (self.side == "conventional" and site.target.split(".")[-1] == "fc2")

    def adapter(self, site: Site, shared: nn.Module | None) -> OutputScaleAdapter | InputScaleAdapter:
        return InputScaleAdapter(site) if self.scales_input(site) else OutputScaleAdapter(site)

    def param_groups(self, adapters: Mapping[str, Adapter], shared: Shared | None, lr: float) -> list[dict[str, Any]]:
        return [{"params": trainable(adapters.values()), "name": "multipliers", "weight_decay": 0.0}]

    def count(self, site: Site) -> int:
        return site.matrix_shape[1 if self.scales_input(site) else 0]
