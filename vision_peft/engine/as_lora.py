"""Any mergeable adapter set as plain LoRA of a chosen rank: the best approximation of each update, with the error it makes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from vision_peft.engine.adapter import find_method
from vision_peft.engine.adapter_set import AdapterSet
from vision_peft.engine.install import _find, _known, attach
from vision_peft.errors import UserError
from vision_peft.linalg.svd import thin_svd


class AsLoRA(NamedTuple):
    adapters: AdapterSet  # attached and active
    error: float  # |update - B A| / |update|, Frobenius norms over all sites together
    worst: tuple[str, float]  # site with the largest error of its own, and that error


@torch.no_grad()
def as_lora(network: nn.Module, rank: int, *, name: str = "default", new_name: str = "as_lora") -> AsLoRA:
    """Attach LoRA adapters whose B A are the best rank-`rank` approximations of what the set `name` adds to the weights.

    The set `name` stays attached, switched off.

    Raises:
        UserError: a method that cannot be merged has no update; LoRA has no place for biases, norms and tokens, nor for a rank above
            a matrix's own.
    """
    found = _find(network)
    _known(found, name)
    source = found.sets[name]
    if found.state.merged:
        raise UserError("adapters are merged into the network: unmerge() before turning them into LoRA")
    if source.method.merge == "impossible":
        raise UserError(f"method {source.method.name} cannot be merged, so it has no update that a LoRA could approximate")
    other = next((site for site in source.sites if site.role != "weight"), None)
    if other is not None:
        raise UserError(f"{other.name}: LoRA adapts weights only, and {source.method.name} changes this {other.role} tensor")
    source.eval()
    lora = find_method("lora")(rank=rank, alpha=float(rank))  # scale 1
    adapters = attach(network, lora, [site.name for site in source.sites], sites=source.sites, name=new_name)
    lost, whole, worst = 0.0, 0.0, ("", 0.0)
    for site, adapter, copy in zip(source.sites, source.adapters.values(), adapters.adapters.values()):
        W = site.matrix(network.get_parameter(site.path)).float()
        U, S, Vh = thin_svd((adapter.weight(W) - W).double())
        root = S[:rank].sqrt()
        copy.B.copy_(U[:, :rank] * root)
        copy.A.copy_(root[:, None] * Vh[:rank])
        missed, size = float(S[rank:].square().sum()), float(S.square().sum())
        lost, whole = lost + missed, whole + size
        worst = max(worst, (site.name, (missed / size) ** 0.5 if size else 0.0), key=lambda each: each[1])
    return AsLoRA(adapters, (lost / whole) ** 0.5 if whole else 0.0, worst)
