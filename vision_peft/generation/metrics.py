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

FLAT = 1e-6  # edge magnitudes up to here are rounding: a step of an 8-bit picture is 4e-3
SAME = 1e-6  # two pictures whose cosine is within this of 1 are one picture


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


def diversity_ratio(adapted: Tensor, source: Tensor) -> Tensor:
    """Diversity of the adapted generator's pictures over that of the source's: near 0 where it collapsed to one picture.

    Raises:
        ValueError: fewer than two pictures on a side, or a source whose pictures are all the same.
    """
    usual = diversity(source)
    if usual == 0:
        raise ValueError("the source's pictures are all the same: there is no diversity to compare with")
    return diversity(adapted) / usual


def intra_cluster(generated: Tensor, references: Tensor) -> Tensor:
    """Mean over references of the mean distance between the generated pictures that are nearest to it; 0 says that all are copies.

    References that fewer than two pictures are nearest to do not count; nan where there is no other.
    """
    _some(generated, references)
    nearest = torch.cdist(generated.double(), references.double()).argmin(1)
    clusters = [generated[nearest == index].double() for index in range(len(references))]
    found = [torch.pdist(cluster).mean() for cluster in clusters if len(cluster) > 1]
    return torch.stack(found).mean() if found else generated.new_full((), float("nan"), dtype=torch.float64)


def structure_sobel(source: Tensor, adapted: Tensor) -> Tensor:
    """(N,) in [0, 1]: 2 sum(p q) / (sum p^2 + sum q^2) of the edge magnitudes p and q of a pair; two pictures without any edge have 1.

    The formula of RSSA's SCS, on Sobel's edges instead of a trained detector's: not comparable with published figures.

    Raises:
        ValueError: no pictures, or shapes that differ: each picture is compared with its own source.
    """
    _some(source, adapted)
    if source.shape != adapted.shape:
        raise ValueError(f"structure compares pairs, not {tuple(source.shape)} with {tuple(adapted.shape)}")
    p, q = (_edges(images).flatten(1) for images in (source, adapted))
    both = p.square().sum(1) + q.square().sum(1)
    return torch.where(both > 0, 2 * (p * q).sum(1) / both.clamp(min=FLAT**2), torch.ones_like(both))


def _edges(images: Tensor) -> Tensor:
    """Sobel magnitudes (N, H, W) of the grey picture, in [0, 1]."""
    grey = (images.double() * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=images.device)[:, None, None]).sum(1)
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=torch.float64, device=images.device) / 4
    padded = F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate")
    both = F.conv2d(padded, torch.stack([kernel, kernel.mT])[:, None])
    magnitude = both.norm(dim=1) / 2**0.5
    return torch.where(magnitude > FLAT, magnitude, 0)  # the kernel's weights add up to 1e-17, not to 0, on a flat picture


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
    if min(len(real), len(generated)) < 2:
        raise ValueError("FID needs at least two pictures on each side")
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
    training pictures are to each other (each to its nearest other; the median). The share is nan where all of training is one picture."""

    cosine: Tensor
    index: Tensor
    copied: float


def nearest_training(generated: Tensor, training: Tensor) -> Nearest:
    """A check against copying."""
    _some(generated, training)
    unit, known = F.normalize(generated.double(), dim=1), F.normalize(training.double(), dim=1)
    cosine, index = (unit @ known.mT).max(1)
    others = known @ known.mT
    # neither itself nor a copy of it is another picture: next to copies no generated picture would ever be too near
    nearest_other = others.masked_fill(others > 1 - SAME, -torch.inf).max(1).values
    usual = nearest_other[nearest_other.isfinite()]
    copied = float((cosine > usual.median()).double().mean()) if len(usual) else float("nan")
    return Nearest(cosine, index, copied)


def _some(*features: Tensor) -> None:
    if not all(len(each) for each in features):
        raise ValueError("no pictures to measure")
