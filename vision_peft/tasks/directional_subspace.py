"""The directional subspace loss of hybrid domain adaptation, on embeddings.

With f_S, f_T the unit embeddings of a source picture and of the adapted one, D = f_T - f_S, and P_i the projection onto the affine hull of
domain i's references:

    distance      sum_i w_i |f_T - P_i(f_T)|^2
    direction     sum_i w_i (1 - <D / max(|D|, tau), u_i>),   u_i = (P_i(f_S) - f_S) / |P_i(f_S) - f_S|,   perpendicular to the hull

The direction is that of the shortest way to each domain: along it nothing changes that tells pictures of a domain from each other. It may
also be one for all pictures, the shortest way from the mean of source embeddings, as StyleGAN-NADA's from mean to mean.
Adapters start as the identity, where D = 0: divided by |D| instead of max(|D|, tau) gradients would be of the order 1e7, and Adam would
remember them.
Source: Few-shot Hybrid Domain Adaptation of Image Generators, ICLR 2024 (abstract); the formulas are this project's reading of it, no code
was released.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from vision_peft.linalg.subspace import Subspace

Mode = Literal["per_domain", "combined", "in_subspace"]


def distance_loss(
    adapted: Tensor, subspaces: Mapping[str, Subspace], weights: Mapping[str, float], power: int = 2, start: Tensor | None = None
) -> Tensor:
    """Weighted mean distance (scalar) of embeddings (B, d) to the domains.

    Args:
        start: (d,) of the ways, see direction_loss(): distances are then to the hyperplane that holds the hull and is perpendicular to the
            way, and what lies beside the way is no distance.
    """
    if start is None:
        return sum(weights[name] * subspace.distance(adapted, power).mean() for name, subspace in subspaces.items())
    total = 0.0
    for name, way in perpendiculars(start.to(adapted)[None], subspaces).items():
        left = (subspaces[name].residual(adapted) * way).sum(1).abs()
        total = total + weights[name] * left.pow(power).mean()
    return total


def direction_loss(
    source: Tensor,
    adapted: Tensor,
    subspaces: Mapping[str, Subspace],
    weights: Mapping[str, float],
    mode: Mode = "per_domain",
    tau: float = 0.05,
    start: Tensor | None = None,
) -> Tensor:
    """Scalar, of embeddings (B, d).

    Args:
        start: (d,) where the shortest ways begin; None: at each picture's source.
        mode: `per_domain` as above; `combined`: towards the direction of sum_i w_i u_i; `in_subspace`: sum_i w_i |B_i D|^2 / max(|D|,
            tau)^2, which forbids only what changes inside the hulls (cosines to several directions cannot all be 1).
        tau: length of D below which it is not normalised.
    """
    change = adapted - source
    length = change.norm(dim=1, keepdim=True).clamp(min=tau)
    if mode == "in_subspace":
        moved = {name: subspace.project(adapted) - subspace.project(source) for name, subspace in subspaces.items()}
        return sum(weights[name] * (each / length).square().sum(1).mean() for name, each in moved.items())
    ways = perpendiculars(source if start is None else start.to(source).expand_as(source), subspaces)
    if mode == "combined":
        joined = torch.nn.functional.normalize(sum(weights[name] * way for name, way in ways.items()), dim=1)
        return 1 - ((change / length) * joined).sum(1).mean()
    return sum(weights[name] * (1 - ((change / length) * way).sum(1)).mean() for name, way in ways.items())


def perpendiculars(source: Tensor, subspaces: Mapping[str, Subspace]) -> dict[str, Tensor]:
    """u_i (B, d), constants."""
    with torch.no_grad():
        found = {name: subspace.project(source) - source for name, subspace in subspaces.items()}
        return {name: torch.nn.functional.normalize(way, dim=1) for name, way in found.items()}
