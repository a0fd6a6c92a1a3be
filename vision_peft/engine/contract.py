"""The contract of an adapted network, checked on any model, any method, any targets; for the tests and for `vision-peft check`.

A check that raises is a failed check with the message as its detail: catching exceptions is the purpose of this file, and no
failure is hidden by it. Every detail carries the largest error found, so a check that barely passes can be seen.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Clock, Method, trainable
from vision_peft.engine.adapter_set import AdapterSet
from vision_peft.engine.evidence import collect
from vision_peft.engine.install import adapters_off, attach, merge, unmerge
from vision_peft.engine.site import Site
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.engine.targets import resolve
from vision_peft.errors import UserError

EXACT = 1e-5  # of the largest entry: the same float32 sums in another order


Forward = Callable[[nn.Module], Tensor]
Targets = str | Sequence[str]
Verdict = tuple[bool, str]  # passed, detail


class Check(NamedTuple):
    name: str
    passed: bool
    detail: str


class Bench:
    """What the checks look at: the network as it was, a copy with adapters, and how to run either."""

    def __init__(self, network: nn.Module, sites: Sequence[Site], method: Method, forward: Forward, targets: Targets, seed: int) -> None:
        self.sites, self.method, self.forward, self.targets, self.seed = sites, method, forward, targets, seed
        # frozen first: torch chooses kernels by requires_grad, and the last bit with them
        self.frozen = copy.deepcopy(network).eval().requires_grad_(False)
        self.network = copy.deepcopy(self.frozen)
        self.output = self.run(self.network)  # of the frozen network
        self.adapters = self.attach(self.network)

    def attach(self, network: nn.Module) -> AdapterSet:
        chosen, kinds = resolve(self.targets, self.sites, self.method), self.method.evidence
        evidence = collect(network, chosen, kinds, [None], lambda _: self.loss(network)) if kinds else None
        return attach(network, self.method, self.targets, sites=self.sites, seed=self.seed, evidence=evidence)

    def run(self, network: nn.Module) -> Tensor:
        with torch.no_grad():
            return self.forward(network)

    def loss(self, network: nn.Module) -> Tensor:
        """Squared distance to the frozen output with noise on it, the same noise every time."""
        noise = torch.randn(self.output.shape, generator=torch.Generator().manual_seed(0)).to(self.output.device)
        return (self.forward(network).float() - self.output.float() - noise).square().mean()


def run_contract(
    network: nn.Module, sites: Sequence[Site], method: Method, forward: Forward, targets: Targets = "all", seed: int = 0
) -> list[Check]:
    """All checks of `method` on the targeted sites of `network`, which is left untouched.

    Args:
        network: loaded, in float32, without adapters; it is copied and run in eval mode.
        forward: runs the network it is given, which is a copy of `network`, on a fixed small input, and returns one tensor.
    """
    try:
        bench = Bench(network, sites, method, forward, targets, seed)
    except Exception as error:
        return [Check("attach", False, _message(error))]
    return [_checked(name, check, bench) for name, check in CHECKS.items()]


def identity_at_init(bench: Bench) -> Verdict:
    """Before the first step the adapted network computes what the frozen one does."""
    if not bench.method.identity_at_init:
        return True, f"skipped: {bench.method.name} does not start at the identity"
    return _close(bench.run(bench.network), bench.output)


def parameter_count(bench: Bench) -> Verdict:
    """The trained numbers are those of the documented formula, and the network itself trains nothing."""
    counts = [bench.method.count(site) for site in bench.adapters.sites]
    if None in counts:
        return not trainable([bench.network]), f"{bench.adapters.num_trainable():,} trained numbers; their number depends on the weights"
    formula = sum(counts)
    shared = sum(p.numel() for p in trainable([bench.adapters.shared])) if bench.adapters.shared is not None else 0
    actual, loose = bench.adapters.num_trainable(), len(trainable([bench.network]))
    detail = f"{actual:,} trained numbers; formula {formula:,} + {shared:,} shared; {loose} unfrozen tensors in the network"
    return actual == formula + shared and loose == 0, detail


def same_seed_same_start(bench: Bench) -> Verdict:
    """A second attach gives the same start, and the global random generator is left alone."""
    before = torch.get_rng_state()
    own, again = bench.adapters.state_dict(), bench.attach(copy.deepcopy(bench.frozen)).state_dict()
    different = [key for key in own if not torch.equal(own[key], again[key])]
    touched = not torch.equal(before, torch.get_rng_state())
    return not different and not touched, f"different: {different[:3]}; global generator {'moved' if touched else 'untouched'}"


def trains(bench: Bench) -> Verdict:
    """Every trained tensor gets a finite gradient within `steps_to_train` steps, and moves. Leaves the adapters trained for the rest."""
    steps = bench.method.steps_to_train
    start = {name: parameter.detach().clone() for name, parameter in bench.adapters.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(bench.adapters.param_groups(1e-2), lr=1e-2, weight_decay=0.0)
    waiting, bad = set(start), set()
    for step in range(steps):
        optimizer.zero_grad()
        (bench.loss(bench.network) + bench.adapters.penalty()).backward()
        gradients = {name: parameter.grad for name, parameter in bench.adapters.named_parameters() if parameter.grad is not None}
        waiting -= {name for name, gradient in gradients.items() if gradient.any()}
        bad |= {name for name, gradient in gradients.items() if not gradient.isfinite().all()}
        bench.adapters.adjust_gradients(Clock(step, steps, 0, optimizer))
        optimizer.step()
        bench.adapters.coordinate(Clock(step + 1, steps, 0, optimizer))
    still = [name for name, value in start.items() if torch.equal(value, bench.adapters.get_parameter(name))]
    detail = f"{len(start)} tensors; without gradient: {sorted(waiting)[:3]}, not finite: {sorted(bad)[:3]}, unmoved: {still[:3]}"
    return bool(start) and not waiting and not bad and not still, detail


def acts(bench: Bench) -> Verdict:
    """The trained adapters change the output: without this the checks of equality below would say nothing."""
    change = _error(bench.run(bench.network), bench.output)
    return 0 < change < float("inf"), f"relative change of the output {change:.1e}"


def factored_equals_weight(bench: Bench) -> Verdict:
    """The factored form and the definition are the same map."""
    if bench.method.reads_input:
        return True, f"skipped: {bench.method.name} is defined by its layers' output"
    errors = []
    bench.adapters.eval()
    for site, adapter in zip(bench.adapters.sites, bench.adapters.named_adapters().values()):
        W = site.matrix(bench.network.get_parameter(site.path)).float()
        with torch.no_grad():
            form = adapter.factored(W)
            if form is not None:
                merged = W + form.B @ form.A
                errors.append(_error(merged if form.scale is None else form.scale[:, None] * merged, adapter.weight(W)))
    detail = f"relative error {max(errors, default=0.0):.1e} over the {len(errors)} sites with a factored form"
    return all(error <= EXACT for error in errors), detail


def merged_equals_unmerged(bench: Bench) -> Verdict:
    """Merged weights compute the same; a method that cannot be merged says so."""
    unmerged = bench.run(bench.network)
    if bench.method.merge == "impossible":
        try:
            merge(bench.network)
        except UserError as refusal:
            return True, f"refused: {refusal}"
        return False, "declared impossible, yet merge() went through"
    merge(bench.network)
    return _close(bench.run(bench.network), unmerged, 0.1 if bench.method.merge == "approximate" else 10 * EXACT)


def unmerge_restores(bench: Bench) -> Verdict:
    """merge then unmerge gives back the frozen weights and the adapted output bit for bit."""
    if bench.method.merge == "impossible":
        return True, "skipped: cannot be merged"
    before = bench.run(bench.network)
    merge(bench.network)
    unmerge(bench.network)
    return _equal([*_changed(bench), *([] if torch.equal(before, bench.run(bench.network)) else ["the output"])])


def off_is_frozen(bench: Bench) -> Verdict:
    """With adapters off the network computes bit for bit what it computed before."""
    with adapters_off(bench.network):
        return _close(bench.run(bench.network), bench.output, 0.0)


def state_dict_unchanged(bench: Bench) -> Verdict:
    """Keys, order and values of the network's state_dict are those of the frozen network."""
    keys, before = list(bench.network.state_dict()), list(bench.frozen.state_dict())
    return _equal(_changed(bench) if keys == before else sorted({*keys} ^ {*before}) or ["the order of the keys"])


def survives_a_file(bench: Bench) -> Verdict:
    """The adapter folder, loaded onto a fresh network, gives the same output."""
    fresh = copy.deepcopy(bench.frozen)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(f"{folder}/adapter", bench.network, seed=bench.seed)
        load_adapter(fresh, f"{folder}/adapter", sites=bench.sites)
    return _close(bench.run(fresh), bench.run(bench.network))


def survives_deepcopy(bench: Bench) -> Verdict:
    """A deep copy computes the same."""
    return _close(bench.run(copy.deepcopy(bench.network)), bench.run(bench.network), 0.0)


def survives_pickle(bench: Bench) -> Verdict:
    """So does a pickle, where the frozen network can be pickled at all."""
    try:
        pickle.dumps(bench.frozen)
    except Exception as error:
        return True, f"skipped: the frozen network cannot be pickled ({_message(error)})"
    return _close(bench.run(pickle.loads(pickle.dumps(bench.network))), bench.run(bench.network), 0.0)


def autocast(bench: Bench) -> Verdict:
    """Under bfloat16 autocast the output is finite and about as close to float32 as the frozen network's is."""
    with torch.autocast(bench.output.device.type, torch.bfloat16):
        output, frozen = bench.run(bench.network), bench.run(bench.frozen)
    own, floor = _error(output, bench.run(bench.network)), _error(frozen, bench.output)
    return own <= max(0.02, 3 * floor), f"relative error {own:.1e}, of the frozen network {floor:.1e}"


# in this order: the checks after `trains` look at trained adapters
CHECKS: dict[str, Callable[[Bench], Verdict]] = {check.__name__: check for check in (
    identity_at_init, parameter_count, same_seed_same_start, trains, acts, factored_equals_weight, merged_equals_unmerged,
    unmerge_restores, off_is_frozen, state_dict_unchanged, survives_a_file, survives_deepcopy, survives_pickle, autocast,
)}  # fmt: skip


def _checked(name: str, check: Callable[[Bench], Verdict], bench: Bench) -> Check:
    try:
        return Check(name, *check(bench))
    except Exception as error:
        return Check(name, False, _message(error))
    finally:
        unmerge(bench.network)  # what a check leaves merged is not the next one's concern


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _error(value: Tensor, reference: Tensor) -> float:
    """Largest difference, of the largest entry of the reference."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).abs().max() / reference.abs().max().clamp(min=1e-30))


def _close(value: Tensor, reference: Tensor, tolerance: float = EXACT) -> Verdict:
    error = _error(value, reference)
    return error <= tolerance, f"relative error {error:.1e}"


def _changed(bench: Bench) -> list[str]:
    now = bench.network.state_dict()
    return [key for key, value in bench.frozen.state_dict().items() if not torch.equal(value, now[key])]


def _equal(different: list[str]) -> Verdict:
    return not different, f"different: {', '.join(different[:3])}" if different else "bit for bit"
