"""Put a method's adapters onto a network, switch, mix, merge and remove them; all as plain functions, Lightning not needed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Evidence, Method
from vision_peft.engine.adapter_set import AdapterSet
from vision_peft.engine.readers import Reader, applies_dropout, fuses_children, make_reader
from vision_peft.engine.site import Site, enumerate_sites
from vision_peft.engine.targets import fused_qkv, resolve
from vision_peft.engine.views import State
from vision_peft.errors import UserError

_ATTRIBUTE = "_vision_peft_installation"


class Installation:
    """What is on one network: its readers, its adapter sets by name, and the values put away by merge()."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.state = State()
        self.sets: dict[str, AdapterSet] = {}
        self.readers: dict[str, Reader] = {}
        self.saved: dict[str, Tensor] = {}

    def reader(self, site: Site) -> Reader:
        for path in _above(site.reader):
            if path not in self.readers and fuses_children(self.network.get_submodule(path)):
                self.readers[path] = make_reader(self.network.get_submodule(path), self.state, ("forward",))
        if site.reader not in self.readers:
            self.readers[site.reader] = make_reader(self.network.get_submodule(site.reader), self.state, site.calls)
        return self.readers[site.reader]

    def add(self, name: str, adapters: AdapterSet) -> None:
        self.sets[name] = adapters
        for site, adapter in zip(adapters.sites, adapters.adapters.values()):
            self.reader(site).view(site.parameter).add(name, site, adapter)

    def discard(self, name: str) -> None:
        self.sets.pop(name)
        self.state.mix.pop(name, None)
        for reader in self.readers.values():
            for view in reader.views.values():
                view.discard(name)
            reader.views = {parameter: view for parameter, view in reader.views.items() if view.entries}
        used = [path for path, reader in self.readers.items() if reader.views]
        needed = {above for path in used for above in (path, *_above(path))}
        for path in self.readers.keys() - needed:
            self.readers.pop(path).remove()


def attach(
    network: nn.Module,
    method: Method,
    targets: str | Sequence[str] = "all",
    *,
    sites: Sequence[Site] | None = None,
    name: str = "default",
    seed: int = 0,
    evidence: Mapping[str, Evidence] | None = None,
    restoring: bool = False,
    beside: bool = False,
) -> AdapterSet:
    """Freeze `network`, put adapters of `method` on the targeted layers, switch them on, and return them.

    Args:
        targets: a preset, a pattern or several (see engine.targets).
        sites: named sites of the network (`backbone.sites()`); by default its parameters under their dotted paths.
        name: name of this adapter set; a network carries any number of sets, see activate().
        seed: of the private generators that start the adapters.
        evidence: what engine.evidence.collect gathered, for methods that ask for it.
        restoring: trained values will be loaded next, so no evidence is needed.
        beside: leave the sets that are active so; no tensor may then be in two of them.
    """
    installation = _find(network, missing_ok=True) or Installation(network)
    if installation.state.merged:
        raise UserError("adapters are merged into the network: unmerge() before attaching others")
    if name in installation.sets:
        raise UserError(f"an adapter set named {name!r} is already attached: detach() it or choose another name")
    missing = set(method.evidence) - _gathered(evidence)
    if missing and not restoring:
        raise UserError(f"method {method.name} needs evidence ({', '.join(sorted(missing))}): collect it first, engine.evidence.collect")
    chosen = resolve(targets, sites if sites is not None else enumerate_sites(network, fused=fused_qkv), method)
    if beside:
        refuse_shared([site for each in installation.state.mix for site in installation.sets[each].sites], chosen)
    adapters = AdapterSet(method, chosen)
    adapters.to(next(network.parameters()).device)
    adapters.initialize(network, seed, evidence)
    network.requires_grad_(False)
    return _install(installation, name, adapters, beside)


def refuse_shared(taken: Sequence[Site] = (), chosen: Sequence[Site] = ()) -> None:
    """UserError where a tensor (or rows of it) would be in two sets that act at once."""
    if both := overlap(taken, chosen):
        raise UserError(f"{both[1].name} is adapted already, as {both[0].name}: a tensor can be in one of the active sets only")


def overlap(taken: Sequence[Site], chosen: Sequence[Site]) -> tuple[Site, Site] | None:
    """The first two sites, one of each, that are (rows of) the same tensor."""
    owners: dict[str, list[Site]] = {}
    for site in taken:
        owners.setdefault(site.path, []).append(site)
    for site in chosen:
        for other in owners.get(site.path, []):
            if site.rows is None or other.rows is None or site.rows == other.rows:
                return other, site
    return None


def _install(installation: Installation, name: str, adapters: AdapterSet, beside: bool = False) -> AdapterSet:
    installation.add(name, adapters)
    installation.state.mix = {**(installation.state.mix if beside else {}), name: 1.0}
    installation.network.__dict__[_ATTRIBUTE] = installation
    _warn_unused_dropout(installation, adapters)
    return adapters


def detach(network: nn.Module, name: str | None = None) -> None:
    """Take one adapter set, or all, off the network, which is then as it was before (unmerge first, if merged)."""
    installation = _find(network)
    if installation.state.merged:
        raise UserError("adapters are merged into the network: unmerge() before detaching, or keep the merged weights by saving them")
    for each in [name] if name is not None else list(installation.sets):
        _known(installation, each)
        installation.discard(each)
    if not installation.sets:
        del installation.network.__dict__[_ATTRIBUTE]


def activate(network: nn.Module, mix: str | Mapping[str, float]) -> None:
    """Choose the active adapter set, or a mix: W' = W + sum of coefficient * (W'_set - W)."""
    installation = _find(network)
    if installation.state.merged:
        raise UserError("adapters are merged into the network: unmerge() before switching")
    wanted = {mix: 1.0} if isinstance(mix, str) else dict(mix)
    for each in wanted:
        _known(installation, each)
        if installation.sets[each].method.reads_input and wanted != {each: 1.0}:
            raise UserError(f"method {installation.sets[each].method.name} has no weights to mix: activate it alone, at 1")
    installation.state.mix = wanted


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model, and any network inside it, computes with its frozen weights alone."""
    states = [installation.state for installation in installations(model)]
    if any(state.merged for state in states):
        raise UserError("adapters are merged into the network: unmerge() before switching them off")
    before = [state.enabled for state in states]
    try:
        for state in states:
            state.enabled = False
        yield
    finally:
        for state, enabled in zip(states, before):
            state.enabled = enabled


@contextmanager
def frozen_weights(network: nn.Module) -> Iterator[None]:
    """adapters_off() that works on merged adapters, too: they are taken out for the block, and merged again behind it."""
    merged = any(installation.state.merged for installation in installations(network))
    if merged:
        unmerge(network)
    try:
        with adapters_off(network):
            yield
    finally:
        if merged:
            merge(network)


def merge(network: nn.Module) -> None:
    """Write the effective weights into the parameters, so that the network runs without any adapter code; undone by unmerge().

    The frozen values are kept aside, not recomputed by subtraction, so unmerge() restores them bit for bit.
    """
    installation = _find(network)
    state = installation.state
    if state.merged:
        return
    for name in state.mix:
        if installation.sets[name].method.merge == "impossible":
            raise UserError(f"method {installation.sets[name].method.name} cannot be merged")
        installation.sets[name].eval()  # what is random while training is not merged
    try:
        with torch.no_grad():
            for path, reader in installation.readers.items():
                for parameter, view in reader.views.items():
                    full = f"{path}.{parameter}" if path else parameter
                    tensor = network.get_parameter(full)
                    effective = view.effective(tensor)
                    installation.saved[full] = tensor.detach().clone()
                    tensor.copy_(effective)
    except BaseException:
        unmerge(network)  # never leave a network half merged
        raise
    state.merged = True


def unmerge(network: nn.Module) -> None:
    """Restore the frozen weights, bit for bit, and let the adapters act again."""
    installation = _find(network)
    with torch.no_grad():
        for path, value in installation.saved.items():
            network.get_parameter(path).copy_(value)
    installation.saved.clear()
    installation.state.merged = False


def installations(model: nn.Module) -> list[Installation]:
    """The installations on `model` and on the modules inside it."""
    return [module.__dict__[_ATTRIBUTE] for module in model.modules() if _ATTRIBUTE in module.__dict__]


def installed(network: nn.Module) -> dict[str, AdapterSet]:
    """The adapter sets on the network, by name."""
    found = _find(network, missing_ok=True)
    return dict(found.sets) if found else {}


def stamp(network: nn.Module) -> tuple[object, ...]:
    """Equal at two moments only if no adapter tensor was written in place and no switch turned in between (`.data` writes escape it)."""
    found = _find(network, missing_ok=True)
    if found is None:
        return ()
    tensors = [tensor for adapters in found.sets.values() for tensor in (*adapters.parameters(), *adapters.buffers())]
    switches = (found.state.enabled, found.state.merged, *found.state.mix.items())
    return (*switches, *((id(tensor), tensor._version) for tensor in tensors))


def _find(network: nn.Module, missing_ok: bool = False) -> Installation | None:
    found = network.__dict__.get(_ATTRIBUTE)
    if found is None and not missing_ok:
        raise UserError(f"no adapters are attached to this {type(network).__name__}")
    return found


def _known(installation: Installation, name: str) -> None:
    if name not in installation.sets:
        raise UserError(f"no adapter set named {name!r}; attached: {', '.join(installation.sets)}")


def _above(path: str) -> list[str]:
    """Paths of the modules that hold the module at `path`, the network itself ("") included."""
    parts = path.split(".") if path else []
    return [".".join(parts[:depth]) for depth in range(len(parts))]



def _gathered(evidence: Mapping[str, Evidence] | None) -> set[str]:
    given = list((evidence or {}).values())
    return {kind for kind in ("gradient", "covariance") if given and all(getattr(each, kind) is not None for each in given)}


def _warn_unused_dropout(installation: Installation, adapters: AdapterSet) -> None:
    without = [site.name for site in adapters.sites if not applies_dropout(installation.reader(site))]
    if without and getattr(adapters.method, "dropout", 0) > 0:
        warnings.warn(
            f"dropout of {adapters.method.name} acts on linear and attention layers only; none at {len(without)} other sites "
            f"({without[0]}, ...)",
            stacklevel=3,
        )
