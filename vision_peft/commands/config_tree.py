"""The innermost branch of jsonargparse's indented message trees, and what it means in one line.

The depth of a line follows the nesting of classes. `Parser key "..."` and `Problem with given class_path '...'` lead to the mistake, the
other lines are reasons. A reason of an unknown kind is passed on as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from vision_peft.commands.config_names import close, find_class, fitting, options, place, wanted

_MANY = 12  # a longer list of what is allowed is left out where something near was found


def innermost(message: str, argv: list[str]) -> str | None:
    """What the deepest reasons of the tree say, with the key in dotted form; None if the message is no tree."""
    found = list(reasons_in(message))
    deepest = max((len(each.trail) for each in found), default=0)
    if deepest == 0:
        return None
    trail = next(each.trail for each in found if len(each.trail) == deepest)
    return explain([each for each in found if each.trail == trail], argv)


class Reason(NamedTuple):
    trail: tuple[tuple[str, str], ...]  # ("key" or "class", name) from the root
    text: str
    value: str | None

    @property
    def path(self) -> list[str]:
        return [part for kind, name in self.trail if kind == "key" for part in name.split(".")]

    @property
    def classes(self) -> list[str]:
        """The class at every key, the last one being what holds the key or option in question."""
        return [name for kind, name in self.trail if kind == "class"]


def reasons_in(message: str) -> Iterator[Reason]:
    stack: list[tuple[int, str, str]] = []  # indentation, kind, name
    lines = message.splitlines()
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        indent, text = len(line) - len(line.lstrip()), line.strip().removeprefix("- ")
        while stack and stack[-1][0] >= indent:
            stack.pop()
        rest = "\n".join(lines[number:])
        if match := re.match(r"Type .* expects a function or a callable class: (.*)", text):
            text = match[1]
            if chosen := re.search(r"Got value: Namespace\(class_path='([^']+)'", rest):
                stack.append((indent, "class", chosen[1]))
        if match := re.match(r'Parser key "(.+?)":\s*(.*)', text):
            stack.append((indent, "key", match[1]))
            text = match[2]
        if match := re.match(r"Problem with given class_path '(.+)':$", text):
            stack.append((indent, "class", match[1]))
        elif text and not re.match(r"(Does not validate against|Subtypes: |Errors:|Given value|Expected a path but)", text):
            value = re.search(r"(?:Got value|Given value|path string): (?:NestedArg\(key=.*?, val=)?(.*)", rest)
            trail = tuple((kind, name) for _, kind, name in stack)
            yield Reason(trail, text, value and re.sub(r"(?<=')\)$", "", value[1]).strip("'"))


def explain(reasons: list[Reason], argv: list[str]) -> str:
    path, classes = reasons[0].path, reasons[0].classes
    key, texts = ".".join(path), [each.text for each in reasons]
    for text in texts:
        if match := re.match(r"(?:Option '([^']+)' is not accepted|unrecognized arguments: --([^=\s]+))", text):
            wrong = (match[1] or match[2]).split(".")[0]
            return _unknown_option([*path, wrong], classes[-1] if classes else "", argv)
        if match := re.match(r"the following arguments are required: (.*)", text):
            return f"{place(path, argv)}{key}: {_short(classes[-1])} needs {match[1]}"
    foreign = any(re.search(r"has no attribute|No module named|a subclass of|Not a valid subclass", text) for text in texts)
    plain = any(re.match(r"Expected a (<class '(int|float)'>|typing\.Literal)", text) for text in texts)
    if foreign or (not plain and any("Expected a dot import path" in text for text in texts)):
        named = [name for name in classes if find_class(name)]
        given = classes[-1] if len(named) < len(classes) else f"{reasons[0].value}"
        return _unknown_class(path, given, find_class(named[-1]) if named else None, argv)
    if any(text.startswith("Expected a ") for text in texts):
        return _wrong_type(path, f"{reasons[0].value}", texts, argv)
    return f"{place(path, argv)}{key}: {texts[0]}" if key else texts[0]


def _unknown_option(path: list[str], owner: str, argv: list[str]) -> str:
    cls = find_class(owner)
    known = options(cls) if cls else []
    near = close(path[-1], [*known, "class_path", "init_args"])
    takes = f"; {_short(owner)} takes {', '.join(known)}" if known and (len(known) <= _MANY or not near) else ""
    return f"{place(path, argv)}{'.'.join(path)}: no such key{takes}{near}"


def _unknown_class(path: list[str], given: str, owner: type | None, argv: list[str]) -> str:
    base = wanted(path, owner)
    start = f"{place(path, argv)}{'.'.join(path)}: {given!r} is no {base.__name__ if base else 'class that can be imported'}"
    known = fitting(base, given) if base else []
    near = close(given, known)
    return f"{start}{f'; known are {_listed(known)}' if known and (len(known) <= _MANY or not near) else ''}{near}"


def _wrong_type(path: list[str], value: str, texts: list[str], argv: list[str]) -> str:
    words: list[str] = []
    types: list[str] = []
    for text in texts:
        literal = re.match(r"Expected a typing\.Literal\[(.*?)\](?:\. Got value|$)", text)
        simple = re.match(r"Expected a (?:<class '([^']+)'>|([^\s.]+))", text)
        if literal:
            words += [each.strip().strip("'") for each in literal[1].split(",")]
        elif simple and "dot import path" not in text:
            types.append({"NoneType": "null"}.get(name := _short(simple[1] or simple[2]), name))
    value = value if len(value) <= 60 else value[:57] + "..."
    return f"{place(path, argv)}{'.'.join(path)}: {value!r} is not valid; expected {_listed([*words, *types])}{close(value, words)}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _short(path: str) -> str:
    return path.rpartition(".")[2]
