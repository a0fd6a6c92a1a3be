"""EVA: LoRA that starts at the main directions of the layer's inputs, with more ranks where few directions do not explain them.

    W' = W + s B A,    C = mean of x x^T over calibration inputs = V diag(lambda) V^T, lambda falling

Start: A = V_R^T (R, n), the leading right singular vectors of the inputs, and B = 0 (m, R), so W' = W. Trained: A and B; W is frozen.

Ranks are dealt out across layers. Direction i of a layer explains the share lambda_i / sum lambda of its inputs. Of all shares of all
layers, the r times (number of layers) largest get a rank; a layer gets at most R = min(round(rho r), m, n) and, here, at least one.
rho = 1 is no redistribution. What is beyond a layer's k is masked, so R (m + n) numbers a weight are held, k (m + n) of
them act, on average r (m + n), and an export has only those. The scale s stays that of r. Linear and convolutional layers only:
others multiply no input.

Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", NeurIPS 2025, arXiv 2410.07170; read in
the code of huggingface/peft, which drops layers that get no rank, subtracts the inputs' mean, and stops its incremental SVD when the
directions no longer move. Here the second moments of all calibration batches are decomposed at once, mean included.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vision_peft.adapters._lora_like import LoRALike
from vision_peft.adapters._low_rank import Scaling, require_rank
from vision_peft.adapters._started import RankedAdapter
from vision_peft.engine.adapter import Adapter, Evidence, Shared
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class EVAAdapter(RankedAdapter):
    explained: Tensor  # (R,): share of the inputs' second moment, falling

    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__(site, rank, scale, dropout)
        self.register_buffer("explained", torch.zeros(rank))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        self.start_empty()
        if evidence.covariance is not None:
            values, vectors = torch.linalg.eigh(evidence.covariance.double())
            rank = self.A.shape[0]
            self.A.copy_(vectors.flip(1)[:, :rank].mT)
            self.explained.copy_(values.flip(0)[:rank].clamp(min=0) / values.clamp(min=0).sum().clamp(min=1e-30))


class EVA(LoRALike):
    """Explained variance adaptation.

    Args:
        rank: r, ranks a layer on average.
        alpha: numerator of the scale.
        scaling: `rank` for alpha / r, `sqrt_rank` for alpha / sqrt(r).
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
        rho: a layer gets at most rho r ranks; 1 or more.
    """

    evidence = ("covariance",)
    formula = "R (m + n), R = min(round(rho r), m, n)"
    advice = "activations of the task are cheap to collect: ranks go where the inputs vary."

    def __init__(self, rank: int = 8, alpha: float = 8.0, scaling: Scaling = "rank", dropout: float = 0.0, rho: float = 2.0) -> None:
        super().__init__(rank, alpha, scaling, dropout)
        if not rho >= 1:
            raise UserError(f"adapter.method.rho: {rho} is less than 1")
        self.rho = rho

    def suits(self, site: Site) -> bool:
        return super().suits(site) and site.kind in ("linear", "conv")

    def largest(self, site: Site) -> int:
        """R."""
        return min(round(self.rho * self.rank), *require_rank(site, self.rank))

    def adapter(self, site: Site, shared: nn.Module | None) -> EVAAdapter:
        return EVAAdapter(site, self.largest(site), self.scale, self.dropout)

    def allocate(self, adapters: Mapping[str, Adapter], shared: Shared | None) -> None:
        first = torch.cat([torch.arange(each.mask.numel()) == 0 for each in adapters.values()])
        shares = torch.cat([each.explained.cpu() for each in adapters.values()])
        owners = torch.cat([torch.full((each.mask.numel(),), index) for index, each in enumerate(adapters.values())])
        order = torch.sort(torch.where(first, torch.inf, shares), descending=True, stable=True).indices
        counts = torch.bincount(owners[order[: self.rank * len(adapters)]], minlength=len(adapters))
        for each, count in zip(adapters.values(), counts.tolist()):
            each.keep(count)

    def count(self, site: Site) -> int:
        return self.largest(site) * sum(site.matrix_shape)
