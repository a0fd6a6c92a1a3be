"""What an adapted generator reached, against the domains it was adapted to and against itself before.

Measures of targets are trivially high where nothing of the source is kept, measures of consistency where nothing changed: read both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vision_peft.generation.metrics import (
    diversity_ratio,
    fid,
    intra_cluster,
    kid,
    nearest_training,
    similarity,
    structure_sobel,
    subspace_distance,
)
from vision_peft.generation.picture_encoder import PictureEncoder
from vision_peft.linalg.subspace import Subspace


class Domain(NamedTuple):
    """References (n, 3, H, W) that were trained on, and held-out pictures (m, 3, H, W), in [-1, 1]."""

    references: Tensor
    held_out: Tensor


@torch.no_grad()
def compare_pictures(
    encoder: PictureEncoder, source: Tensor, adapted: Tensor, domains: Mapping[str, Domain], hybrid: Tensor | None = None
) -> dict[str, float]:
    """Measures of pictures (N, 3, H, W) in [-1, 1], of the frozen and of the adapted generator from the same noise.

    Returns:
        distance/DOMAIN: mean distance of embeddings to the affine hull of the references; similarity/DOMAIN: mean cosine to held-out
        pictures (CS-I); both also of the source, as .../DOMAIN/source; similarity_least: of the worst domain; similarity/hybrid, kid/hybrid
        where there are pictures of it; kid/DOMAIN, fid/DOMAIN (biased by few pictures); consistency: mean cosine of each picture to its
        source's; structure: of Sobel edges; diversity: mean pairwise distance over the source's; intra_cluster/DOMAIN; copied/DOMAIN: share
        of pictures that are nearer to a reference than references are to each other.
    """
    f_source, f_adapted = encoder.many(source), encoder.many(adapted)
    found: dict[str, float] = {}
    for name, domain in domains.items():
        references, held_out = encoder.many(domain.references), encoder.many(domain.held_out)
        hull = Subspace.of(references)
        found[f"distance/{name}"] = float(subspace_distance(f_adapted, hull))
        found[f"distance/{name}/source"] = float(subspace_distance(f_source, hull))
        found[f"similarity/{name}"] = float(similarity(f_adapted, held_out))
        found[f"similarity/{name}/source"] = float(similarity(f_source, held_out))
        found[f"kid/{name}"] = kid(held_out, f_adapted)
        found[f"fid/{name}"] = fid(held_out, f_adapted)
        found[f"intra_cluster/{name}"] = float(intra_cluster(f_adapted, references))
        found[f"copied/{name}"] = float(nearest_training(f_adapted, references).copied)
    found["similarity_least"] = min(found[f"similarity/{name}"] for name in domains)
    if hybrid is not None and len(hybrid):
        features = encoder.many(hybrid)
        for suffix, own in (("", f_adapted), ("/source", f_source)):
            found[f"similarity/hybrid{suffix}"] = float(similarity(own, features))
            found[f"kid/hybrid{suffix}"] = kid(features, own)
    found["consistency"] = float((f_source * f_adapted).sum(1).mean())
    found["structure"] = float(structure_sobel(source / 2 + 0.5, adapted.clamp(-1, 1) / 2 + 0.5).mean())
    found["diversity"] = float(diversity_ratio(f_adapted, f_source))
    return found
