"""Readers: what runs in place of a module's call so that it sees effective weights; parameters stay where and what they are.

A reader is a plain object stored as the instance's `forward`, so state_dict keys, deepcopy, pickle and hooks are untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.engine.attention import BatchedAttention, attend, attention, is_plain, is_self_attention
from vision_peft.engine.factored import factored_linear
from vision_peft.engine.factored_conv import Geometry, factored_conv
from vision_peft.engine.views import State, View
from vision_peft.errors import UserError


class Reader:
    """Base of the readers of one module. Calls the module's own code with the parameters shadowed by their effective values."""

    def __init__(self, module: nn.Module, state: State, calls: tuple[str, ...]) -> None:
        self.module = module
        self.state = state
        self.views: dict[str, View] = {}  # parameter path from the module -> View
        self.original = {call: module.__dict__.get(call) for call in calls}
        for call in calls:
            object.__setattr__(module, call, _Call(self, call))

    def remove(self) -> None:
        """Give the module its own methods back."""
        for call, own in self.original.items():
            if own is None:
                object.__delattr__(self.module, call)
            else:
                object.__setattr__(self.module, call, own)

    def view(self, parameter: str) -> View:
        return self.views.setdefault(parameter, View(self.state))

    def own(self, call: str, *args: Any, **kwargs: Any) -> Any:
        """The module's method as it was before installation."""
        instance = self.original[call]
        return instance(*args, **kwargs) if instance is not None else getattr(type(self.module), call)(self.module, *args, **kwargs)

    def run(self, call: str, *args: Any, **kwargs: Any) -> Any:
        if self.state.observer is not None and call == "forward":
            self.observe(*args, **kwargs)
        if not self.state.live:
            return self.own(call, *args, **kwargs)
        for view in self.views.values():
            view.sync(self.module.training)
        return self.adapted(call, *args, **kwargs)

    def adapted(self, call: str, *args: Any, **kwargs: Any) -> Any:
        with _shadowed(self.module, self.views):
            return self.own(call, *args, **kwargs)

    def observe(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Report the module's input to the evidence pass."""
        for name in self.views:
            self.report(name, x)

    def report(self, parameter: str, x: Tensor) -> None:
        for sets in self.views[parameter].entries.values():
            site = next(iter(sets.values()))[0]
            if site.role == "weight":
                self.state.observer(site, x)

    def linear(self, x: Tensor, weight: str, bias: str) -> Tensor:
        """x W'^T + b' for the parameters of these paths, by the factored path where the adapters have one."""
        W, b = _parameter(self.module, weight), _parameter(self.module, bias)
        if b is not None and bias in self.views:
            b = self.views[bias].effective(b)
        if weight not in self.views:
            return F.linear(x, W, b)
        blocks = self.views[weight].factored(W)
        if blocks is not None:
            return factored_linear(x, W, b, blocks, self.module.training)
        own = self.views[weight].linear(x, W, b)
        if own is not None:
            return own
        return F.linear(x, self.views[weight].effective(W), b)


class _Call:
    """A bound method of a reader that pickles and deep-copies."""

    def __init__(self, reader: Reader, call: str) -> None:
        self.reader, self.call = reader, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.reader.run(self.call, *args, **kwargs)


class LinearReader(Reader):
    """nn.Linear, whole or in row slices: one matrix product."""

    def adapted(self, call: str, input: Tensor) -> Tensor:
        return self.linear(input, "weight", "bias")


class ConvReader(Reader):
    """nn.Conv2d whose kernel's geometry is plain numbers: one convolution."""

    def adapted(self, call: str, input: Tensor) -> Tensor:
        W, b = _parameter(self.module, "weight"), _parameter(self.module, "bias")
        blocks = self.views["weight"].factored(W) if "weight" in self.views and W.dtype == torch.float32 else None
        if blocks is None or len(blocks) > 1:
            return super().adapted(call, input)
        if b is not None and "bias" in self.views:
            b = self.views["bias"].effective(b)
        return factored_conv(input, W, b, blocks[0][1], Geometry.of(self.module))


class AttentionReader(Reader):
    """nn.MultiheadAttention re-expressed over its own tensors, so that q, k, v and out take the cheap path.

    What is no plain self-attention runs the module's own code with shadowed parameters, which is the same function at the price of
    dense weight gradients and without dropout.
    """

    def adapted(
        self,
        call: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not is_plain(self.module, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal):
            options = {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
            options |= {"average_attn_weights": average_attn_weights, "is_causal": is_causal}
            return super().adapted(call, query, key, value, **options)
        return attention(self.module, query, attn_mask, self.linear), None

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        if not is_self_attention(self.module, query, key, value, key_padding_mask):
            raise UserError("evidence: covariances of an attention are taken of batched self-attention without padding masks only")
        for name in self.views:
            if name == "in_proj_weight":
                self.report(name, query)
            elif name == "out_proj.weight":
                self.report(name, attend(self.module, query, attn_mask, self.linear))


class FusedReader(Reader):
    """nn.TransformerEncoder and its layer: in eval mode their fused kernel reads the parameters past the modules that own them.

    It is kept from doing so while adapters act; the layer then calls its attention and its linear maps.
    """

    def adapted(self, call: str, *args: Any, **kwargs: Any) -> Any:
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return super().adapted(call, *args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)


_FUSED = (nn.TransformerEncoder.forward, nn.TransformerEncoderLayer.forward)


def make_reader(module: nn.Module, state: State, calls: tuple[str, ...]) -> Reader:
    """The cheapest reader that is exact for this module; decided by the code its class runs, never by names."""
    own = type(module).forward
    if calls == ("forward",) and "forward" not in module.__dict__:
        if own is nn.Linear.forward:
            return LinearReader(module, state, calls)
        if own is nn.Conv2d.forward and Geometry.of(module) is not None:
            return ConvReader(module, state, calls)
        if own in (nn.MultiheadAttention.forward, BatchedAttention.forward):
            return AttentionReader(module, state, calls)
    return FusedReader(module, state, calls) if own in _FUSED else Reader(module, state, calls)


def fuses_children(module: nn.Module) -> bool:
    """Whether a call of the module may read its children's parameters without calling the children."""
    return type(module).forward in _FUSED


def applies_dropout(reader: Reader) -> bool:
    """Whether the reader can drop inputs of a branch; a shadowed weight has no branch."""
    return isinstance(reader, (LinearReader, AttentionReader))


def _owner(module: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    path, _, name = parameter.rpartition(".")
    return (module.get_submodule(path) if path else module), name


def _parameter(module: nn.Module, parameter: str) -> Tensor | None:
    """The frozen tensor itself, whether or not it is shadowed at the moment."""
    owner, name = _owner(module, parameter)
    return owner._parameters.get(name)


@contextmanager
def _shadowed(module: nn.Module, views: dict[str, View]) -> Iterator[None]:
    """Within the block, attribute access to these parameters gives their effective values; nesting is harmless."""
    undo: list[tuple[nn.Module, str, Tensor | None]] = []
    try:
        for parameter, view in views.items():
            owner, name = _owner(module, parameter)
            undo.append((owner, name, owner.__dict__.get(name)))
            object.__setattr__(owner, name, view.effective(owner._parameters[name]))
        yield
    finally:
        for owner, name, before in reversed(undo):
            if before is not None:
                object.__setattr__(owner, name, before)
            else:
                owner.__dict__.pop(name, None)
