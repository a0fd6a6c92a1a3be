"""AdapterSet: the adapters of one method on all its sites, with what they share, their start, and the fingerprints of their bases."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Clock, Evidence, Method, Shared, trainable
from vision_peft.engine.site import Site
from vision_peft.errors import UserError


class AdapterSet(nn.Module):
    """The trainable side of an adapted network: one adapter a site, what they share, and the method that steers them.

    It is a module of its own, not a child of the network: hand its parameters to the optimizer, move it with `.to()`
    beside the network, save its state_dict. Keys are `adapters.<site name with / for .>.<parameter>` and `shared.<...>`.
    """

    def __init__(self, method: Method, sites: Sequence[Site]) -> None:
        super().__init__()
        self.method = method
        self.sites = list(sites)
        self.label, self.lr = "", None  # before the names of its optimizer groups; a learning rate of its own
        if len({_key(site) for site in self.sites}) < len(self.sites):
            raise UserError("two of the sites have the same name: names must be unique in a network")
        self.shared = method.shared(self.sites)
        self.adapters = nn.ModuleDict({_key(site): method.adapter(site, self.shared) for site in self.sites})
        for name, parameter in self.named_parameters():
            if parameter.dtype != torch.float32:
                raise TypeError(f"{name}: trained tensors are float32, got {parameter.dtype}")
        self.register_state_dict_post_hook(_add_fingerprints)
        self.register_load_state_dict_pre_hook(_check_fingerprints)

    def named_adapters(self) -> dict[str, Adapter]:
        """Adapters by site name."""
        return {site.name: self.adapters[_key(site)] for site in self.sites}

    def initialize(self, network: nn.Module, seed: int = 0, evidence: Mapping[str, Evidence] | None = None) -> None:
        """Start every adapter from the network's present weights. Draws depend on the seed and the site's name only."""
        if self.shared is not None:
            with torch.no_grad():
                self.shared.initialize(torch.Generator().manual_seed(_seed(seed, "shared")))
        for site in self.sites:
            W = site.matrix(network.get_parameter(site.path).detach()).float()
            given = (evidence or {}).get(site.name) or Evidence(torch.Generator())
            given.generator.manual_seed(_seed(seed, site.name))
            with torch.no_grad(), torch.autocast(W.device.type, enabled=False):
                self.adapters[_key(site)].initialize(W, given)
        with torch.no_grad():
            self.method.allocate(self.named_adapters(), self.shared)

    def penalty(self) -> Tensor | float:
        """Sum of the adapters' penalties, to add to the loss."""
        own = sum(adapter.penalty() for adapter in self.adapters.values())
        return own if self.shared is None else own + self.shared.penalty()

    def adjust_gradients(self, clock: Clock) -> None:
        """To call before every optimizer step."""
        with torch.no_grad():
            self.method.adjust_gradients(self.named_adapters(), self.shared, clock)

    def coordinate(self, clock: Clock) -> None:
        """To call after every optimizer step, before the gradients are cleared."""
        with torch.no_grad():
            self.method.coordinate(self.named_adapters(), self.shared, clock)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for an optimizer of this learning rate; `self.lr`, where it is set, goes before it."""
        own = {} if self.lr is None else {"lr": self.lr}
        groups = self.method.param_groups(self.named_adapters(), self.shared, self.lr or lr)
        return [{**own, **group, "name": self.label + group["name"]} for group in groups]

    def num_trainable(self) -> int:
        return sum(parameter.numel() for parameter in trainable([self]))


def _add_fingerprints(adapters: AdapterSet, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """state_dict carries what pins a recomputed basis, so that loading can tell a different one."""
    for _, path, module in _marked(adapters):
        mark = module.fingerprint()
        if mark is not None:
            state[f"{prefix}{path}.fingerprint"] = mark.detach().float().cpu()


def _check_fingerprints(adapters: AdapterSet, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, path, module in _marked(adapters):
        mark = module.fingerprint()
        stored = state.pop(f"{prefix}{path}.fingerprint", None)
        if mark is None or stored is None:
            if (mark is None) != (stored is None):
                raise UserError(f"{name}: the fingerprint of the adapter's basis is {'missing' if stored is None else 'not expected'}")
            continue
        if not torch.allclose(stored.to(mark), mark, rtol=1e-3, atol=1e-4):
            raise UserError(f"{name}: the basis recomputed on load is not the one the adapter was trained with")


def _marked(adapters: AdapterSet) -> list[tuple[str, str, Adapter | Shared]]:
    """(name for people, path, module) of everything that may recompute a basis."""
    shared = [("shared bases", "shared", adapters.shared)] if adapters.shared is not None else []
    return shared + [(site.name, f"adapters.{_key(site)}", adapters.adapters[_key(site)]) for site in adapters.sites]


def _key(site: Site) -> str:
    return site.name.replace(".", "/")  # module names cannot hold dots


def _seed(seed: int, name: str) -> int:
    """A seed of its own for each site, so that adding or dropping targets leaves the other sites' starts alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
