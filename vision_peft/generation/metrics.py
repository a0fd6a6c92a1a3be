"""Measures of generated pictures, on embeddings (N, d) and on pictures (N, 3, H, W) in [0, 1].

Sources: CS-I as in UniHDA (arXiv 2401.12596); SCS of Xiao et al., RSSA, CVPR 2022; distance inside clusters of Ojha et al., CVPR 2021; KID
of Binkowski et al., ICLR 2018; FID of Heusel et al., NIPS 2017.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_peft.linalg.subspace import Subspace


def similarity(generated: Tensor, references: Tensor) -> Tensor:
    """Mean cosine over all pairs (CS-I), in [-1, 1]."""
    _some(generated, references)
    return (F.normalize(generated.double(), dim=1) @ F.normalize(references.double(), dim=1).mT).mean()


def subspace_distance(generated: Tensor, subspace: Subspace) -> Tensor:
    """Mean |f - P(f)|."""
    _some(generated)
    return subspace.distance(generated.double(), 1).mean()


def diversity(features: Tensor) -> Tensor:
    """Mean distance between two of them."""
    _some(features)
    if len(features) < 2:
        raise ValueError("diversity needs at least two pictures")
    return torch.pdist(features.double()).mean()


def intra_cluster(generated: Tensor, references: Tensor) -> Tensor:
    """Mean over references of the mean distance between the generated pictures that are nearest to it; 0 says that all are copies.

    References that fewer than two pictures are nearest to do not count; nan where there is no other.
    """
    _some(generated, references)
    nearest = torch.cdist(generated.double(), references.double()).argmin(1)
    clusters = [generated[nearest == index].double() for index in range(len(references))]
    found = [torch.pdist(cluster).mean() for cluster in clusters if len(cluster) > 1]
    return torch.stack(found).mean() if found else torch.tensor(float("nan"))


def structure_sobel(source: Tensor, adapted: Tensor) -> Tensor:
    """(N,) in [0, 1]: 2 sum(p q) / (sum p^2 + sum q^2) of the edge magnitudes p and q of a pair; two pictures without any edge have 1.

    The formula of RSSA's SCS, on Sobel's edges instead of a trained detector's: not comparable with published figures.
    """
    _some(source, adapted)
    p, q = (_edges(images).flatten(1) for images in (source, adapted))
    both = p.square().sum(1) + q.square().sum(1)
    return torch.where(both > 0, 2 * (p * q).sum(1) / both.clamp(min=1e-12), torch.ones_like(both))


def _edges(images: Tensor) -> Tensor:
    """Sobel magnitudes (N, H, W) of the grey picture, in [0, 1]."""
    grey = (images.double() * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=images.device)[:, None, None]).sum(1)
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=torch.float64, device=images.device) / 4
    padded = F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate")
    both = F.conv2d(padded, torch.stack([kernel, kernel.mT])[:, None])
    return both.norm(dim=1) / 2**0.5


def kid(real: Tensor, generated: Tensor) -> float:
    """Unbiased squared MMD of features with the kernel (x . y / d + 1)^3: 0 on average for two draws of one set, also for small ones."""
    _some(real, generated)
    if min(len(real), len(generated)) < 2:
        raise ValueError("KID needs at least two pictures on each side")
    x, y = real.double(), generated.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT / a.shape[1] + 1) ** 3

    own = sum((kernel(each, each).sum() - kernel(each, each).diagonal().sum()) / (len(each) * (len(each) - 1)) for each in (x, y))
    return float(own - 2 * kernel(x, y).mean())


def fid(real: Tensor, generated: Tensor) -> float:
    """Frechet distance of two Gaussians through features, by torchmetrics; far too high where pictures are fewer than dimensions."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    _some(real, generated)
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), normalize=True).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


class _Given(torch.nn.Module):
    """Features that are features already; torchmetrics asks for their number."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class Nearest(NamedTuple):
    """Of each generated picture the cosine to the nearest training picture (N,), which one it is (N,), and the share that is nearer than
    training pictures are to each other (each to its nearest other; the median)."""

    cosine: Tensor
    index: Tensor
    copied: float


def nearest_training(generated: Tensor, training: Tensor) -> Nearest:
    """A check against copying."""
    _some(generated, training)
    unit, known = F.normalize(generated.double(), dim=1), F.normalize(training.double(), dim=1)
    cosine, index = (unit @ known.mT).max(1)
    others = (known @ known.mT).fill_diagonal_(-1.0)
    usual = others.max(1).values.median() if len(known) > 1 else torch.tensor(1.0)
    return Nearest(cosine, index, float((cosine > usual).double().mean()))


def _some(*features: Tensor) -> None:
    if not all(len(each) for each in features):
        raise ValueError("no pictures to measure")
