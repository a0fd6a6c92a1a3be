"""Words for prompts: an optional `classnames.json` (label -> words) beside the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vision_peft.errors import UserError

FILE = "classnames.json"


def read_json(file: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: unreadable or not JSON; names the file and the line.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def class_names(folder: Path, labels: list[str]) -> list[str]:
    """What prompts call each of `labels`: its words in `folder`/classnames.json; the labels themselves where there is no such file.

    Raises:
        UserError: the file is not an object of strings, or lacks one of the labels.
    """
    file = folder / FILE
    if not file.exists():
        return list(labels)
    words = read_json(file)
    if not isinstance(words, dict) or not all(isinstance(word, str) for word in words.values()):
        raise UserError(f"{file}: expected an object of label -> words, both strings")
    missing = [label for label in labels if label not in words]
    if missing:
        raise UserError(f"{file}: no words for label {missing[0]!r} ({len(missing)} of {len(labels)} labels are missing)")
    return [words[label] for label in labels]
