"""SSF: a trained scale and shift for every output channel of a layer.

    y = gamma * (W x + b) + beta        so  W' = diag(gamma) W,  b' = gamma * b + beta        gamma, beta (m,)

The scale belongs to the layer, not to the tensor: the site of the weight trains gamma, the site of the bias trains beta and reads the
gamma of its layer through what all adapters share. Where only one of the two tensors is targeted or exists, the other half drops out:
no shift without a bias, b' = b + beta where the weight is not adapted (all norms). Channels are the rows of the flattened weight.
Start: gamma = 1, beta = 0, so W' = W. Trained: m numbers a weight and m a bias; W and b are frozen. gamma has no weight decay, which
would pull it to zero and not to one.

Source: Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", NeurIPS 2022; from general
knowledge, not read anew. The authors add noise of standard deviation 0.02 to both at the start, and scale the norms too; this
project does neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Evidence, Factored, Method, Shared
from vision_peft.engine.site import Site


class ScaleAdapter(Adapter):
    """Of a weight: W' = diag(gamma) W."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(site.matrix_shape[0]))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.gamma.fill_(1.0)

    def weight(self, W: Tensor) -> Tensor:
        return self.gamma[:, None] * W

    def factored(self, W: Tensor) -> Factored:
        return Factored(W.new_zeros(W.shape[0], 0), W.new_zeros(0, W.shape[1]), self.gamma)  # no branch: the scale is all


class LayerScales(Shared):
    """The adapters of the weights by layer. A plain dictionary: each is saved and moved where it belongs."""

    def __init__(self) -> None:
        super().__init__()
        self.of_layer: dict[str, ScaleAdapter] = {}


class ShiftAdapter(Adapter):
    """Of a bias: b' = gamma * b + beta with the gamma of the layer's weight."""

    scales: LayerScales | None

    def __init__(self, site: Site, scales: LayerScales | None) -> None:
        super().__init__()
        self.layer = site.target
        object.__setattr__(self, "scales", scales)  # no child: it would be saved with every bias
        self.beta = nn.Parameter(torch.zeros(site.matrix_shape))  # (m, 1), a bias as the engine shows it

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.beta.zero_()

    def weight(self, W: Tensor) -> Tensor:
        scale = self.scales.of_layer.get(self.layer) if self.scales is not None else None
        return self.beta + (W if scale is None else scale.gamma[:, None] * W)


class SSF(Method):
    """Scaling and shifting of features; has no hyper-parameters."""

    roles = ("weight", "bias")
    kind = "scaling"
    source = "abstract"
    formula = "m a weight, m a bias"
    advice = "shifts of feature statistics are the problem: a scale and a shift for every channel."

    def __init__(self) -> None: ...

    def shared(self, sites: Sequence[Site]) -> LayerScales:
        return LayerScales()

    def adapter(self, site: Site, shared: LayerScales | None) -> ScaleAdapter | ShiftAdapter:
        if site.role == "bias":
            return ShiftAdapter(site, shared)
        adapter = ScaleAdapter(site)
        if shared is not None:
            shared.of_layer[site.target] = adapter
        return adapter

    def param_groups(self, adapters: Mapping[str, Adapter], shared: Shared | None, lr: float) -> list[dict[str, Any]]:
        scales = [adapter.gamma for adapter in adapters.values() if isinstance(adapter, ScaleAdapter)]
        shifts = [adapter.beta for adapter in adapters.values() if isinstance(adapter, ShiftAdapter)]
        groups = [{"params": scales, "name": "scales", "weight_decay": 0.0}, {"params": shifts, "name": "shifts"}]
        return [group for group in groups if group["params"]]

    def count(self, site: Site) -> int:
        return site.matrix_shape[0]
