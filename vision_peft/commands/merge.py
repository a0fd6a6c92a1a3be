"""`vision-peft merge`: fold an adapter into the weights of its backbone, as one file that needs none of this project."""

from __future__ import annotations

from pathlib import Path

from vision_peft.commands.export import export
from vision_peft.commands.parser import CommandParser


def main(command: str, argv: list[str]) -> None:
    parser = CommandParser(command, __doc__)
    parser.add_argument("adapter", type=Path, help="an adapter folder, or a run folder")
    parser.add_argument("--output", type=Path, required=True, help="file to write, e.g. backbone.safetensors")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    given = parser.parse_args(argv)
    export(given.adapter, "merged", given.output, force=given.force)
