"""A site: one tensor of a frozen network (or one row slice of it) that a method may replace."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

Role = Literal["weight", "bias", "other"]
Kind = Literal["linear", "conv", "embedding", "bare", "vector"]


@dataclass(frozen=True)
class Site:
    """Where a tensor lives, who reads it, and what it looks like as a matrix.

    Attributes:
        name: canonical name, unique in the network, e.g. `vision.3.attn.q` or `vision.3.attn.q.bias`.
        target: canonical name of the layer, what patterns match, e.g. `vision.3.attn.q` for both of the above.
        reader: dotted path of the module whose call reads the tensor (the attention, not its `out_proj`, for nn.MultiheadAttention).
        parameter: dotted path of the parameter from the reader, e.g. `weight`, `in_proj_weight`, `out_proj.weight`.
        shape: shape of the tensor, or of the slice.
        rows: first and last-plus-one row of the slice; None for the whole tensor.
        role: `weight` (a matrix or kernel), `bias`, or `other` (norm scales, position tables, tokens).
        kind: what reads it; `bare` is a matrix that no standard layer owns.
        calls: the reader's methods during which the tensor is read.
    """

    name: str
    target: str
    reader: str
    parameter: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    role: Role = "weight"
    kind: Kind = "linear"
    calls: tuple[str, ...] = ("forward",)

    @property
    def path(self) -> str:
        """Dotted path of the parameter from the network's root, i.e. its state_dict key."""
        return f"{self.reader}.{self.parameter}" if self.reader else self.parameter

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the 2-D view.

        A kernel (out, in/groups, kh, kw) is flattened to (out, in/groups*kh*kw), a vector is one column, a scalar 1 x 1.
        """
        out, *rest = self.shape or (1,)
        columns = 1
        for size in rest:
            columns *= size
        return out, columns

    def slice(self, tensor: Tensor) -> Tensor:
        """The site's part of the whole parameter, in the parameter's own shape."""
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]

    def matrix(self, tensor: Tensor) -> Tensor:
        """The 2-D view (out, in) of the site's part of the whole parameter."""
        return self.slice(tensor).reshape(self.matrix_shape)


def enumerate_sites(
    network: nn.Module,
    rename: Callable[[str], str] = lambda path: path,
    fused: Callable[[str, nn.Module], Sequence[str] | None] = lambda path, module: None,
    calls: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Site]:
    """Every parameter of `network` as sites, in the order of `named_parameters`.

    Args:
        network: any module; works on the meta device, no values are read.
        rename: dotted module path -> canonical layer name.
        fused: (path, Linear) -> canonical names of the equal row blocks of a fused projection such as timm's qkv, or None.
        calls: methods that read a module's own parameters, by module path, where it is not `forward`
            (e.g. `{"": ("encode_text",)}` for a root whose text projection is read there).
    """
    sites: list[Site] = []
    seen: set[int] = set()

    def add(target: str, reader: str, parameter: str, tensor: Tensor, role: Role, kind: Kind, blocks: Sequence[str] = ()) -> None:
        target = target or parameter  # the network is a single layer
        suffix = {"weight": "", "bias": ".bias", "other": f".{parameter}"}[role]
        where = (calls or {}).get(reader, ("forward",))
        if not blocks:
            sites.append(Site(target + suffix, target, reader, parameter, tuple(tensor.shape), None, role, kind, where))
            return
        height = tensor.shape[0] // len(blocks)
        for index, block in enumerate(blocks):
            rows = (index * height, (index + 1) * height)
            sites.append(Site(block + suffix, block, reader, parameter, (height, *tensor.shape[1:]), rows, role, kind, where))

    for path, module in network.named_modules():
        for parameter, tensor in _owned(path, module, network):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            layer = rename(path)
            blocks = [f"{layer}.{part}" for part in "qkv"]
            if isinstance(module, nn.MultiheadAttention):
                if parameter.startswith("out_proj."):
                    add(f"{layer}.out", path, parameter, tensor, "bias" if tensor.ndim == 1 else "weight", "linear")
                elif parameter in ("in_proj_weight", "in_proj_bias"):
                    add(layer, path, parameter, tensor, "bias" if tensor.ndim == 1 else "weight", "linear", blocks)
                elif parameter in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                    add(f"{layer}.{parameter[0]}", path, parameter, tensor, "weight", "bare")
                else:  # bias_k, bias_v
                    add(layer, path, parameter, tensor, "other", "vector")
            elif parameter in ("in_proj_weight", "in_proj_bias"):  # an attention class of its own around PyTorch's packed projection
                add(layer, path, parameter, tensor, "bias" if tensor.ndim == 1 else "weight", "bare", blocks)
            elif isinstance(module, nn.Linear) and parameter in ("weight", "bias"):
                add(layer, path, parameter, tensor, "weight" if parameter == "weight" else "bias", "linear", fused(path, module) or ())
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and parameter in ("weight", "bias"):
                add(layer, path, parameter, tensor, "weight" if parameter == "weight" else "bias", "conv")
            elif isinstance(module, nn.Embedding):
                add(layer, path, parameter, tensor, "weight", "embedding")
            elif parameter == "bias":
                add(layer, path, parameter, tensor, "bias", "vector")
            elif tensor.ndim == 2 and parameter != "weight":
                add(f"{layer}.{parameter}" if layer else parameter, path, parameter, tensor, "weight", "bare")
            else:
                add(layer, path, parameter, tensor, "other", "vector")
    return sites


def whole_sites(sites: Sequence[Site]) -> list[Site]:
    """Each parameter that is listed in row slices as one site more, `vision.3.attn.qkv` for q, k and v; all tensors of such layers."""
    slices: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        if site.rows is not None:
            slices.setdefault((site.reader, site.parameter), []).append(site)
    found = []
    for parts in slices.values():
        parts = sorted(parts, key=lambda site: site.rows)
        layer = parts[0].target.rpartition(".")[0]
        target = ".".join(filter(None, [layer, "".join(part.target.rpartition(".")[2] for part in parts)]))
        suffix = parts[0].name.removeprefix(parts[0].target)
        shape = (parts[-1].rows[1], *parts[0].shape[1:])
        found.append(replace(parts[0], name=target + suffix, target=target, shape=shape, rows=None))
    return found


def _owned(path: str, module: nn.Module, network: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, parameter) pairs that a call of `module` reads: its own, and an nn.MultiheadAttention's out_proj's too."""
    own = list(module.named_parameters(recurse=False))
    if isinstance(module, nn.MultiheadAttention):
        own += [(f"out_proj.{name}", tensor) for name, tensor in module.out_proj.named_parameters(recurse=False)]
    return own


def renamer(rules: Sequence[tuple[str, str]]) -> Callable[[str], str]:
    """A `rename` for `enumerate_sites` from (regular expression, replacement) rules; the first that matches the whole path wins."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rename(path: str) -> str:
        for pattern, replacement in compiled:
            match = pattern.fullmatch(path)
            if match:
                return match.expand(replacement)
        return path

    return rename
