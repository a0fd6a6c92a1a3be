"""Argument parsing of the tool commands: usage errors are UserErrors, as everywhere else."""

from __future__ import annotations

import argparse
from typing import NoReturn

from vision_peft.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """The parser of `vision-peft COMMAND`; the page of the command's module is its description."""

    def __init__(self, command: str, page: str | None, usage: str | None = None) -> None:
        text = (page or "").partition(": ")[2]
        super().__init__(f"vision-peft {command}", usage=usage, description=text[:1].upper() + text[1:], allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")
