"""The contract of a method: an Adapter maps one frozen weight to the weight used in its place, a Method makes and steers them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vision_peft.engine.site import Role, Site
from vision_peft.errors import UserError, nearest


class Factored(NamedTuple):
    """W' = diag(scale) (W + B A), the form for which the engine never builds a dense weight gradient.

    With `dropout` > 0 the branch sees dropped inputs while training: y = scale * (W x + B A drop(x)) + b.
    """

    B: Tensor  # (out, r), any scaling folded in
    A: Tensor  # (r, in)
    scale: Tensor | None = None  # (out,); None stands for ones
    dropout: float = 0.0
    trained: int | None = None  # only the leading columns of B and rows of A have gradients; None: all of them


@dataclass
class Evidence:
    """What a start may draw on.

    Gradient and covariance are None unless the method's `evidence` asks for them, and also while trained values are about to be
    loaded: initialize() then only has to give every tensor its shape and to recompute what depends on W alone.
    """

    generator: torch.Generator  # private to the site, on the CPU
    gradient: Tensor | None = None  # (out, in): mean gradient of the loss over the calibration batches
    covariance: Tensor | None = None  # (in, in): mean of x x^T over the tokens (or patches) that the site multiplied


class Adapter(nn.Module):
    """The trainables of one site. W is always the frozen 2-D view (out, in) in float32."""

    def initialize(self, W: Tensor, evidence: Evidence) -> None:
        """Fill parameters and bases, once, after the pretrained weights are there."""
        raise NotImplementedError(f"{type(self).__name__} must define initialize()")

    def weight(self, W: Tensor) -> Tensor:
        """The definition: the weight (out, in) used in place of W, differentiable in the adapter's parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define weight()")

    def factored(self, W: Tensor) -> Factored | None:
        """The same map in factored form, where the method has one; must agree with weight() when dropout is off."""
        return None

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor | None:
        """The adapted layer's output (..., out) for x (..., in), for what no weight can express; None: weight() says it all.

        Called on linear and attention layers only. W and b are the frozen tensors in their own type. A method whose layers have
        no weight() at all says `reads_input`.
        """
        return None

    def penalty(self) -> Tensor | float:
        """Term added to the loss, 0 by default."""
        return 0.0

    def compact(self) -> Adapter:
        """An equal adapter without what is zero; called before an export."""
        return self

    def fingerprint(self) -> Tensor | None:
        """A few float32 numbers that pin a basis recomputed from W on load; they are stored and compared. None: nothing is recomputed."""
        return None


class Shared(nn.Module):
    """What all adapters of a set have in common: random bases, tied factors, gates across layers. Trained and saved once."""

    def initialize(self, generator: torch.Generator) -> None:
        """Fill it, before the adapters are; draws come from the private CPU generator."""

    def penalty(self) -> Tensor | float:
        """Term added to the loss, 0 by default."""
        return 0.0

    def fingerprint(self) -> Tensor | None:
        """A few float32 numbers that pin bases drawn anew on load; they are stored and compared. None: nothing is drawn anew."""
        return None


class FactoredAdapter(Adapter):
    """An adapter whose definition is its factored form."""

    def factored(self, W: Tensor) -> Factored:
        raise NotImplementedError(f"{type(self).__name__} must define factored()")

    def weight(self, W: Tensor) -> Tensor:
        form = self.factored(W)
        merged = W + form.B @ form.A
        return merged if form.scale is None else form.scale[:, None] * merged


@dataclass(frozen=True)
class Clock:
    """Where training stands when a method is called: `step` optimizer steps of `total` are done."""

    step: int
    total: int
    epoch: int
    optimizer: torch.optim.Optimizer | None = None  # that trains the adapters, for methods that touch its rates or moments

    def group(self, parameter: Tensor) -> dict[str, Any]:
        """The optimizer's group (lr, weight_decay, ...) that holds the parameter."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        for group in groups:
            if any(each is parameter for each in group["params"]):
                return group
        raise LookupError("no optimizer group holds this parameter")


class Method:
    """Hyper-parameters of a method and the decisions that span its adapters.

    A subclass stores every argument of its __init__ under the argument's own name; it is registered under the name of its
    file. Class attributes tell the engine, the tests and the exports what to expect, so that nobody needs to know names.
    """

    roles: ClassVar[tuple[Role, ...]] = ("weight",)  # which tensors of the targeted layers it adapts
    evidence: ClassVar[tuple[Literal["gradient", "covariance"], ...]] = ()  # what the calibration pass must collect
    identity_at_init: ClassVar[bool] = True  # W' = W before the first step
    reads_input: ClassVar[bool] = False  # defined by linear() alone: acts on linear and attention layers only, cannot be merged
    steps_to_train: ClassVar[int] = 2  # optimizer steps until every trained tensor has had a gradient
    tiny: ClassVar[dict[str, Any]] = {}  # hyper-parameters that suit layers a few numbers wide, for tests
    merge: ClassVar[Literal["exact", "approximate", "impossible"]] = "exact"
    low_rank: ClassVar[bool] = False  # W' - W is B A with the factors of factored(): exports as a LoRA
    kind: ClassVar[str] = "dense"  # low-rank, dense, svd, bias ...: for tables
    source: ClassVar[Literal["code", "text", "abstract"]] = "code"  # what its definition was read from
    formula: ClassVar[str] = ""  # trainable numbers per site in m (out), n (in) and the hyper-parameters
    advice: ClassVar[str] = ""  # when to choose it, in one sentence

    registry: ClassVar[dict[str, type[Method]]] = {}
    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rpartition(".")[2]
        if cls.name.startswith("_"):  # what several methods have in common is none itself
            return
        known = Method.registry.get(cls.name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise TypeError(f"two methods are called {cls.name!r}: {known.__qualname__} and {cls.__qualname__}")
        Method.registry[cls.name] = cls

    def suits(self, site: Site) -> bool:
        """Whether it can adapt that site at all; patterns pass over the others."""
        return site.role in self.roles and (site.kind == "linear" or not self.reads_input)

    def shared(self, sites: Sequence[Site]) -> Shared | None:
        """One module for all sites; its parameters are trained and saved with the adapters."""
        return None

    def adapter(self, site: Site, shared: Shared | None) -> Adapter:
        """A new adapter of the right shape, not yet initialised. Raises UserError where a hyper-parameter does not fit the site."""
        raise NotImplementedError(f"{type(self).__name__} must define adapter()")

    def allocate(self, adapters: Mapping[str, Adapter], shared: Shared | None) -> None:
        """Called once after all adapters are initialized: what is decided across layers. Sets masks, never shapes."""

    def adjust_gradients(self, adapters: Mapping[str, Adapter], shared: Shared | None, clock: Clock) -> None:
        """Called before every optimizer step, with the gradients in place (unscaled): projections, preconditioning."""

    def coordinate(self, adapters: Mapping[str, Adapter], shared: Shared | None, clock: Clock) -> None:
        """Called after every optimizer step, gradients still there: proximal steps, budgets, switching.

        State lives in buffers, so that it resumes.
        """

    def param_groups(self, adapters: Mapping[str, Adapter], shared: Shared | None, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups; a method with roles of their own rate or decay overrides this."""
        modules = [*adapters.values(), *([shared] if shared is not None else [])]
        return [{"params": trainable(modules), "name": "adapter"}]

    def count(self, site: Site) -> int | None:
        """Trainable numbers that the documented formula gives for a site (shared ones not included); None: they depend on the weights."""
        raise NotImplementedError(f"{type(self).__name__} must define count()")

    def hyperparameters(self) -> dict[str, Any]:
        """The arguments of __init__ as they stand, JSON-ready."""
        return {key: getattr(self, key) for key in inspect.signature(type(self).__init__).parameters if key != "self"}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.hyperparameters().items())})"


def trainable(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of the modules that require a gradient, each once."""
    return list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())


def method_names() -> list[str]:
    """Names of all methods of the catalogue, without importing any."""
    import vision_peft.adapters as catalogue

    return sorted(entry.name for entry in pkgutil.iter_modules(catalogue.__path__) if not entry.name.startswith("_"))


def find_method(name: str) -> type[Method]:
    """The method class of that name: registered already, or a file of the catalogue. Raises UserError with the nearest names."""
    if name not in Method.registry and name in method_names():
        importlib.import_module(f"vision_peft.adapters.{name}")
    if name not in Method.registry:
        raise UserError(f"unknown method {name!r}{nearest(name, method_names())}")
    return Method.registry[name]
