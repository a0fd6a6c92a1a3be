"""SNELL: a full-rank sparse update from few numbers: a kernel of two sets of points, of which the largest entries survive.

    K_ij = a_1 |p_i - q_j| + a_2 |p'_i - q'_j|,    (p, p')_i in R^r of output i, (q, q')_j in R^r of input j, halves of r/2 each
    dW_ij = K_ij |K_ij| where |K_ij| > w, else 0,  w the s-quantile of |K|, anew at every step;    W' = W + dW

Stored as P_out (2, m, r/2) and P_in (2, n, r/2), a = (0.1, -0.1). |K_ij| as a factor is a constant in the backward pass, so survivors
receive the gradient times |K_ij| and the others none: an entry that is out is still a function of its points and may come back.
Start: uniform in +-1 / sqrt(features * r/2), which gives a tiny dW, not zero. Trained: r (m + n) numbers a weight.

The published numbers come from the program, which is the default; `paper` is equation 5, dW = K max(|K| - w, 0) with w the ceil(s m n)-th
smallest |K|, differentiated in K; `hard` leaves K as it is where it survives. At s = 0 program and `hard` use K itself, not K |K|:
the family jumps there by a factor of about 1000, and some of the published tasks were trained that way. q, k and v compete each for
itself. Dropout of the branch's inputs and dropping of whole samples are 0.1 in the program, 0 here, and act on linear and attention
layers, the output projection included. On those layers the dense dW is rebuilt in the backward pass, which is where the paper's memory
saving comes from. Kernels of convolutions are flattened, which is this project's choice.

Source: Shen et al., "Expanding Sparse Tuning for Low Memory Usage", NeurIPS 2024 (paper and code: ssfgunner/SNELL).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.adapters._kernel import distance_kernel, order_statistic, recomputed_linear, start_points_
from vision_peft.adapters._low_rank import require_dropout
from vision_peft.engine.adapter import Adapter, Evidence, Method
from vision_peft.engine.site import Site
from vision_peft.errors import UserError

Sparsify = Literal["code", "paper", "hard"]


class SNELLAdapter(Adapter):
    alpha: Tensor  # (2,)

    def __init__(self, site: Site, method: SNELL) -> None:
        super().__init__()
        out, columns = site.matrix_shape
        self.sparsity, self.sparsify, self.dropout, self.drop_path = method.sparsity, method.sparsify, method.dropout, method.drop_path
        self.P_out = nn.Parameter(torch.zeros(2, out, method.rank // 2))
        self.P_in = nn.Parameter(torch.zeros(2, columns, method.rank // 2))
        if method.learn_alpha:
            self.alpha = nn.Parameter(torch.zeros(2))
        else:
            self.register_buffer("alpha", torch.zeros(2))

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        start_points_(self.P_in, evidence.generator)
        start_points_(self.P_out, evidence.generator)
        self.alpha.copy_(torch.tensor([0.1, -0.1]))

    def weight(self, W: Tensor) -> Tensor:
        return W + self.delta(self.P_out, self.P_in, self.alpha, threshold=[])

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        build = partial(self.delta, threshold=[])
        tensors = (self.P_out, self.P_in, self.alpha)
        if not self.training or self.dropout == self.drop_path == 0:
            return recomputed_linear(x, W, b, build, *tensors)
        branch = recomputed_linear(F.dropout(x, self.dropout), None, None, build, *tensors)
        keep = 1 - self.drop_path
        samples = branch.new_empty(len(branch), *[1] * (branch.dim() - 1)).bernoulli_(keep).div_(keep)
        return F.linear(x, W, b) + samples * branch

    def delta(self, P_out: Tensor, P_in: Tensor, alpha: Tensor, threshold: list[Tensor]) -> Tensor:
        """dW (m, n). Puts w into the empty list; selecting it costs as much as the kernel, so the backward pass takes it from there."""
        K = distance_kernel(P_out, P_in, alpha)
        if self.sparsity == 0 and self.sparsify != "paper":
            return K
        size = K.detach().abs()
        if not threshold:
            threshold.append(self._threshold(size))
        if self.sparsify == "paper":
            return K * (K.abs() - threshold[0]).relu()
        survives = size > threshold[0]
        return K * (survives if self.sparsify == "hard" else size * survives)

    def _threshold(self, size: Tensor) -> Tensor:
        if self.sparsify != "paper":
            return order_statistic(size, self.sparsity * (size.numel() - 1))
        ordinal = math.ceil(self.sparsity * size.numel() - 1e-9)  # 0.7 * 10 is a little more than 7
        return order_statistic(size, ordinal - 1) if ordinal else size.new_zeros(())


class SNELL(Method):
    """Kernelised low-rank update with competition between its entries.

    Args:
        rank: r, even: coordinates of a point, half of them in each distance.
        sparsity: s, share of the entries of every weight's update that is zero, in [0, 1); chosen per task (0.3 is CUB-200's).
        sparsify: `code`, `paper` or `hard`, see above.
        learn_alpha: train the two factors of the distances, as the paper writes; the program keeps them at 0.1 and -0.1.
        dropout: probability with which the branch's inputs are dropped while training, on linear and attention layers.
        drop_path: probability with which a sample's whole branch is dropped there.
    """

    kind = "sparse"
    formula = "r (m + n), 2 more with learn_alpha"
    advice = "tasks differ from pre-training in a few weights: the strongest entries compete."
    identity_at_init = False

    def __init__(
        self,
        rank: int = 32,
        sparsity: float = 0.3,
        sparsify: Sparsify = "code",
        learn_alpha: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        if rank < 2 or rank % 2:
            raise UserError(f"adapter.method.rank: {rank} is not a positive even number")
        if not 0 <= sparsity < 1:
            raise UserError(f"adapter.method.sparsity: {sparsity} is not in [0, 1)")
        if sparsify not in ("code", "paper", "hard"):
            raise UserError(f"adapter.method.sparsify: {sparsify!r} is not one of code, paper, hard")
        if not 0 <= drop_path < 1:
            raise UserError(f"adapter.method.drop_path: {drop_path} is not in [0, 1)")
        self.rank, self.sparsity, self.sparsify, self.learn_alpha = rank, sparsity, sparsify, learn_alpha
        self.dropout, self.drop_path = require_dropout(dropout), drop_path

    def adapter(self, site: Site, shared: nn.Module | None) -> SNELLAdapter:
        return SNELLAdapter(site, self)

    def count(self, site: Site) -> int:
        return self.rank * sum(site.matrix_shape) + 2 * self.learn_alpha
