"""Which layers a method adapts: presets and patterns over canonical names, the table of sites, nearest-name errors."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from vision_peft.engine.adapter import Method
from vision_peft.engine.site import Site, whole_sites
from vision_peft.errors import UserError, nearest


def _ends(*names: str) -> Callable[[Site], bool]:
    suffixes = tuple(tuple(name.split(".")) for name in names)
    return lambda site: any(tuple(site.target.split(".")[-len(suffix) :]) == suffix for suffix in suffixes)


PRESETS: dict[str, Callable[[Site], bool]] = {
    "qv": _ends("attn.q", "attn.v"),
    "qkv": _ends("attn.q", "attn.k", "attn.v"),
    "attn": _ends("attn.q", "attn.k", "attn.v", "attn.out"),
    "mlp": _ends("mlp.fc1", "mlp.fc2"),
    "attn+mlp": _ends("attn.q", "attn.k", "attn.v", "attn.out", "mlp.fc1", "mlp.fc2"),
    "conv": lambda site: site.kind == "conv",
    "all": lambda site: True,
}


def resolve(targets: str | Sequence[str], sites: Sequence[Site], method: Method) -> list[Site]:
    """The sites that the method suits whose layer matches, in network order.

    Args:
        targets: presets (`qv`, `qkv`, `attn`, `mlp`, `attn+mlp`, `conv`, `all`; `vision:qv` and `text:qv` keep to one tower) or globs
            over canonical names of layers or tensors, with braces and ranges: `vision.{6..11}.attn.{q,v}`, `text.*.mlp.*`,
            `vision.pos_embed`. `*` also matches dots. `vision.*.attn.qkv` takes a fused projection as one matrix, not as three.

    Raises:
        UserError: for a pattern that matches nothing (names the nearest layers), or where none matches a tensor that the method can adapt.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise UserError("adapter.targets is empty: give a preset or a pattern")
    matched: dict[str, Site] = {}
    whole = whole_sites(sites)
    for pattern in wanted:
        found = [site for site in sites if _matches(pattern, site)] or [site for site in whole if _matches(pattern, site)]
        if not found:
            raise UserError(_no_match(pattern, sites))
        matched |= {site.name: site for site in found}
    chosen = {name for name, site in matched.items() if method.suits(site)}
    if not chosen:
        kinds, patterns = " or ".join(method.roles), ", ".join(map(repr, wanted))
        where = " of linear and attention layers" if method.reads_input else ""
        raise UserError(f"adapter.targets: {patterns} matches {len(matched)} tensors, but {method.name} adapts {kinds} tensors{where} only")
    _refuse_twice(matched[name] for name in chosen)
    return [site for site in [*sites, *whole] if site.name in chosen]


def _refuse_twice(chosen: Iterable[Site]) -> None:
    """A fused projection is adapted whole or in parts, not both."""
    seen: dict[str, Site] = {}
    for site in chosen:
        other = seen.setdefault(site.path, site)
        if other is not site and (other.rows is None or site.rows is None):
            raise UserError(f"adapter.targets: {other.name} and {site.name} are one tensor: take it whole or in parts")


def _matches(pattern: str, site: Site) -> bool:
    tower, colon, preset = pattern.partition(":")
    if colon and preset in PRESETS:
        return site.target.split(".")[0] == tower and PRESETS[preset](site)
    if pattern in PRESETS:
        return PRESETS[pattern](site)
    return any(fnmatch.fnmatchcase(name, glob) for glob in expand(pattern) for name in (site.target, site.name))


def expand(pattern: str) -> list[str]:
    """Globs without braces: `a.{1..3}.{q,v}` -> `a.1.q`, `a.1.v`, `a.2.q`, ..."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span and int(span[1]) > int(span[2]):
        raise UserError(f"adapter.targets: {pattern!r} holds an empty range, {{{match[1]}}}")
    options: Iterable[str] = map(str, range(int(span[1]), int(span[2]) + 1)) if span else match[1].split(",")
    return [whole for option in options for whole in expand(pattern[: match.start()] + option + pattern[match.end() :])]


def _no_match(pattern: str, sites: Sequence[Site]) -> str:
    names = list(dict.fromkeys(site.target for site in sites))
    if not names:
        return f"adapter.targets: {pattern!r} matches no layer: the network has no parameters"
    plain = expand(pattern)[0].replace("*", names[0].split(".")[1] if "." in names[0] else "0")
    return f"adapter.targets: {pattern!r} matches no layer{nearest(plain, [*PRESETS, *names])}"


def fused_qkv(path: str, module: nn.Linear) -> list[str] | None:
    """q, k, v blocks of a fused projection in a network without canonical names: a Linear called exactly `qkv` with three rows a column."""
    parent, _, last = path.rpartition(".")
    if last != "qkv" or module.out_features != 3 * module.in_features:
        return None
    return [f"{parent}.{part}" if parent else part for part in "qkv"]


def table(sites: Sequence[Site], method: Method, collapse: bool = False) -> str:
    """Site, kind, shape, trainable numbers, size in the adapter file, memory while training (value, gradient, two AdamW moments).

    With `collapse`, sites that differ in numbers of their name only (blocks) share a row: `vision.{0..8}.attn.q`, 9 sites.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], list[Site]] = {}
    for site in sites:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", site.name) if collapse else site.name
        groups.setdefault((pattern, site.kind, site.shape), []).append(site)
    rows = [("site", "kind", "shape", "sites", "trainable", "saved KiB", "memory KiB")]
    total: int | None = 0
    for (pattern, kind, shape), members in groups.items():
        counts = [method.count(site) for site in members]
        count = None if None in counts else sum(counts)
        total = None if None in (total, count) else total + count
        rows.append((_span(pattern, members), kind, " x ".join(map(str, shape)), str(len(members)), *_sizes(count)))
    rows.append(("total", "", "", str(len(sites)), *_sizes(total)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(_align(cell, width, column) for column, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _sizes(count: int | None) -> tuple[str, str, str]:
    if count is None:  # chosen by the weights, which are not read here
        return "by weights", "", ""
    return f"{count:,}", f"{count * 4 / 1024:.1f}", f"{count * 16 / 1024:.1f}"


def _span(pattern: str, members: Sequence[Site]) -> str:
    """The pattern with the numbers its members have: `{first..last}` where they are consecutive, `*` otherwise."""
    if "#" not in pattern:
        return pattern
    found = [[int(part) for part in re.findall(r"(?<=\.)\d+(?=\.)", site.name)] for site in members]
    for values in zip(*found):
        distinct = sorted(set(values))
        if len(distinct) == 1:
            text = str(distinct[0])
        else:
            text = f"{{{distinct[0]}..{distinct[-1]}}}" if distinct == list(range(distinct[0], distinct[-1] + 1)) else "*"
        pattern = pattern.replace("#", text, 1)
    return pattern


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)
