"""A configuration error as one line: the file, the key, the value, what was expected and the nearest match."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vision_peft.commands.config_names import CHOICES, GROUPS, close, configs, keys, place
from vision_peft.commands.config_tree import innermost
from vision_peft.errors import UserError


def users_fault(error: BaseException) -> bool:
    """Whether an error of parsing or building a configuration is the user's to mend; everything else deserves its traceback."""
    kinds = list(_chain(error))
    if any(isinstance(each, (SyntaxError, NameError)) for each in kinds):  # a module named in the config is broken
        return False
    return type(error).__name__ == "ArgumentError" or any(isinstance(each, UserError) for each in kinds)


def one_line(error: BaseException | str, argv: list[str]) -> str:
    """An error of parsing a configuration, or of building its classes, in one line."""
    for each in _chain(error) if isinstance(error, BaseException) else ():
        if isinstance(each, UserError):
            return _flat(str(each))
    message = str(error)
    for pattern, explain in _WHOLE:
        if match := re.match(pattern, message, re.DOTALL):
            return _flat(explain(argv, *match.groups()))
    return _flat(innermost(message, argv) or message)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _flat(text: str) -> str:
    return " ".join(text.split())


# ---- messages that are no tree ----


def _unrecognized(argv: list[str], word: str) -> str:
    if not word.startswith("-"):
        return f"unexpected word {word!r}: options start with --"
    key = word.lstrip("-").partition("=")[0]
    return _unknown_key(argv, key)


def _unknown_key(argv: list[str], key: str) -> str:
    """A key, or the dotted name of an option, that no group of the parser has."""
    group, _, rest = key.partition(".")
    if group in GROUPS:
        key = f"{group}.{rest.split('.')[0]}"
        near = close(key, (each for each in keys() if each.startswith(f"{group}.")))
    else:
        key, near = group, close(group, {each.partition(".")[0] for each in keys()}) or close(group, keys())
    return f"{place(key.split('.'), argv)}{key}: no such key{near}"


def _no_file(argv: list[str], name: str) -> str:
    path = Path(name)
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"--config: {path} does not exist{close(path.stem, [Path(each).stem for each in siblings if each.endswith(('.yaml', '.yml'))])}"


def _broken_yaml(argv: list[str], *reason: str) -> str:
    for path in configs(argv):
        try:
            content = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            return f"{path}{line}: not valid YAML ({getattr(error, 'problem', None) or error})"
        except (OSError, UnicodeDecodeError) as error:
            return f"{path}: cannot be read ({error})"
        if not isinstance(content, dict):
            what = "is empty" if content is None else "holds no keys with values"
            return f"{path}: {what}; a configuration has {', '.join([*CHOICES, *GROUPS])}"
    return f"configuration: {' '.join(reason)}"


def _missing(argv: list[str], names: str) -> str:
    names = re.sub(r"\b\w+\.(?=model|data)", "", names)
    return f"the configuration lacks {names}: give --config FILE, e.g. --config configs/quickstart.yaml"


def _ambiguous(argv: list[str], word: str, could: str) -> str:
    return f"{word}: no such option; did you mean {', '.join(each for each in could.split(', ') if not each.endswith('+'))}?"


_WHOLE: list[tuple[str, Any]] = [
    (r"unrecognized arguments: (\S+)", _unrecognized),
    (r"Subcommand '\w+' does not accept option '([^']+)'", _unknown_key),
    (r"Group '([^']+)' does not accept option '([^']+)'", lambda argv, group, rest: _unknown_key(argv, f"{group}.{rest}")),
    (r'Parser key "config": File does not exist: \'(.+)\'', _no_file),
    (r'Parser key "config": (.*)', lambda argv, reason: f"--config: {reason}"),
    (r"(Problems parsing config:.*|Unexpected config:.*)", _broken_yaml),
    (r"the following arguments are required: (.*)", _missing),
    (r"ambiguous option: (\S+) could match (.*)", _ambiguous),
    (r'Parser key "(\w+)":\s+Unable to load config (\S+)', lambda argv, key, given: f"{key}: {given} is neither a file nor a set of keys"),
]
