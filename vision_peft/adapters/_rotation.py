"""What orthogonal fine-tuning and its butterfly form share: blocks of trained rotations between input coordinates.

A layout is a tensor (k, b) of coordinates: block i turns the b coordinates of its row among themselves. Coordinates from n on are
padding and are never turned, so any width works with any block size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotationBlocks(nn.Module):
    """k orthogonal blocks (b, b) by Cayley's transform, R = (I + Q)^-1 (I - Q), Q skew; all the identity at Q = 0.

    Trained: the entries of Q above the diagonal whose two coordinates exist, b (b - 1) / 2 for a full block; once for all if shared.
    """

    entry: Tensor  # (k, b, b), which trained number stands at each place of Q
    sign: Tensor  # (k, b, b), its sign: 1 above the diagonal, -1 below, 0 where there is none

    def __init__(self, layout: Tensor, n: int, shared: bool = False) -> None:
        super().__init__()
        k, b = layout.shape
        exists = layout < n
        upper = torch.ones(b, b, dtype=torch.bool).triu(1)
        here = upper & exists[:, :, None] & exists[:, None, :]  # (k, b, b)
        numbered = (upper[None] if shared else here).flatten().long().cumsum(0).view(-1, b, b).expand(k, b, b) - 1
        entry = torch.where(here, numbered, 0)
        sign = here.float()
        self.register_buffer("entry", entry + entry.mT, persistent=False)
        self.register_buffer("sign", sign - sign.mT, persistent=False)
        self.theta = nn.Parameter(torch.zeros(count_angles(layout, n, shared)))

    def skew(self) -> Tensor:
        """Q (k, b, b)."""
        return self.sign * self.theta.index_select(0, self.entry.flatten()).view(self.entry.shape)

    def forward(self, dropped: float = 0.0) -> Tensor:
        """R (k, b, b); that share of the blocks, drawn anew, is replaced by the identity while training."""
        Q = self.skew()
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        R = torch.linalg.solve(eye + Q, eye - Q)  # both factors commute
        if self.training and dropped:
            out = torch.randperm(len(R), device=R.device) < int(dropped * len(R))
            R = torch.where(out[:, None, None], eye, R)
        return R


def count_angles(layout: Tensor, n: int, shared: bool = False) -> int:
    """Trained numbers of RotationBlocks."""
    sizes = torch.tensor([layout.shape[1]]) if shared else (layout < n).sum(1)
    return int((sizes * (sizes - 1) // 2).sum())
