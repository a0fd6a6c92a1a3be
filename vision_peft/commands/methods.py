"""`vision-peft methods`: the catalogue by the flags of its classes, one method with its page and hyper-parameters, or all as Markdown.

Source: read from official code, from a paper's text or from its abstract. Trained per site: in m (out), n (in) and the hyper-parameters.
Step: of LoRA's, in float32 / bf16, ViT-S with every linear layer adapted, as scripts/bench_methods.py measures it; - where it has not been.
"""

from __future__ import annotations

import csv
import inspect
import json
import sys
import typing
from importlib import resources
from typing import Any

from vision_peft.commands.columns import columns
from vision_peft.commands.parser import CommandParser
from vision_peft.engine.adapter import Method, find_method, method_names
from vision_peft.errors import UserError, nearest

HEADER = ("name", "class", "kind", "source", "trained per site", "starts as identity", "merge", "to PEFT", "adapts", "layers", "step")


def main(command: str, argv: list[str]) -> None:
    parser = CommandParser(command, __doc__)
    parser.add_argument("name", nargs="?", help="show one method: its page, its hyper-parameters with defaults")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--markdown", action="store_true", help="the table and a card for every method: what docs/methods.md holds")
    given = parser.parse_args(argv)
    if given.name:
        cls = _find(given.name)
        print(json.dumps({**facts(cls), "hyperparameters": hyperparameters(cls)}, indent=2, default=str) if given.json else page(cls))
        return
    found = [find_method(name) for name in method_names()]
    if given.json:
        print(json.dumps([facts(cls) for cls in found], indent=2))
    elif given.markdown:
        print(markdown(found), end="")
    else:
        print(columns([HEADER, *map(_row, found)]))
        print(f"\n{len(found)} methods. In YAML: adapter: {{method: {{class_path: LoRA, init_args: {{rank: 8}}}}}}")
        print("More of one: vision-peft methods NAME")


def facts(cls: type[Method]) -> dict[str, Any]:
    """The flags of a method with its default hyper-parameters, on which some of them depend, in the order of the table."""
    required = any(value.default is value.empty for value in list(inspect.signature(cls.__init__).parameters.values())[1:])
    own = cls if required else cls()
    return {
        "name": cls.name,
        "class": cls.__name__,
        "kind": own.kind,
        "source": own.source,
        "formula": own.formula,
        "identity_at_init": own.identity_at_init,
        "merge": own.merge,
        "low_rank": own.low_rank,
        "roles": list(own.roles),
        "reads_input": own.reads_input,
        "step": costs().get(cls.name),
    }


def costs() -> dict[str, list[str]]:
    """Step time of LoRA's by method, (float32, bf16), as scripts/bench_methods.py measured it; "" where it was not."""
    text = resources.files("vision_peft.commands").joinpath("method_costs.csv").read_text()
    return {name: values for name, *values in list(csv.reader(text.splitlines()))[1:]}


def markdown(found: list[type[Method]]) -> str:
    """Table and cards."""
    rows = [" | ".join(cell.replace("|", "\\|") for cell in _row(cls)) for cls in found]
    table = "\n".join([f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|", *(f"| {row} |" for row in rows)])
    head = f"# The catalogue\n\n{len(found)} methods. Written by `vision-peft methods --markdown`; columns: `vision-peft methods --help`."
    return f"{head}\nAccuracies: [results_methods.md](results_methods.md).\n\n{table}\n\n" + "\n".join(map(_card, found))


def _card(cls: type[Method]) -> str:
    text = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    command = f"vision-peft fit --config configs/task/fewshot_vit.yaml --config configs/method/{cls.name}.yaml"
    count = f"Trained per site: {cls.formula}."
    return f"## {cls.name}\n\n{text}\n\n{count} **When:** {cls.advice}\n\n    {command}\n"


def _row(cls: type[Method]) -> list[str]:
    own = facts(cls)
    step = "/".join(value or "-" for value in own["step"]) if own["step"] else "-"
    layers = "linear, attention" if own["reads_input"] else "all"
    export = "yes" if own["low_rank"] else "no" if own["merge"] == "impossible" else "by a chosen rank"
    shown = [_cell(own[key]) for key in ("name", "class", "kind", "source", "formula", "identity_at_init", "merge")]
    return [*shown, export, _cell(own["roles"]), layers, step]


def hyperparameters(cls: type[Method]) -> dict[str, Any]:
    """Defaults by name; None also where an argument is required."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {each.name: None if each.default is each.empty else each.default for each in parameters}


def page(cls: type[Method]) -> str:
    """What the method's file says of it, its hyper-parameters, and how to name it in YAML."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    hints = typing.get_type_hints(cls.__init__)
    defaults = ["required" if each.default is each.empty else json.dumps(each.default) for each in parameters]
    rows = [(each.name, _type(hints[each.name]), default) for each, default in zip(parameters, defaults)]
    table = columns([("hyper-parameter", "type", "default"), *rows]) if rows else "no hyper-parameters"
    flags = ", ".join(f"{key} {_cell(value)}" for key, value in facts(cls).items() if key not in ("name", "class", "step"))
    settings = ", ".join(f"{name}: {default}" for name, _, default in rows)
    yaml = f"adapter:\n  method:\n    class_path: {cls.__name__}" + (f"\n    init_args: {{{settings}}}" if settings else "")
    text = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    own = f"{cls.__name__}: {inspect.cleandoc(cls.__doc__ or '')}"
    return "\n\n".join([text, own, table, *([f"When: {cls.advice}"] if cls.advice else []), flags, yaml])


def _find(name: str) -> type[Method]:
    """By file name or class name, in any case."""
    for known in method_names():
        cls = find_method(known)
        if name.lower() in (known.lower(), cls.__name__.lower()):
            return cls
    raise UserError(f"unknown method {name!r}{nearest(name.lower(), method_names())}")


def _type(hint: Any) -> str:
    options = typing.get_args(hint)
    return " | ".join(map(_type, options)) if options else "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _cell(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, (bool, str)) else ", ".join(value)
