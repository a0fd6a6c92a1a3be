"""`vision-peft continual`: one task after another on the same vision-language model, each merged into it before the next.

Every task is a run of `fit` with a new adapter on the weights that the task before left. After each, the model is tested on the sets of
all tasks, later ones included: among a set's own classes, and among the classes of all. The same command again goes on where it was
stopped.

  vision-peft continual --config configs/task/continual_clip.yaml --sequence configs/sequence/xtail.yaml --run checkpoints/xtail
  vision-peft continual --config configs/task/continual_clip.yaml --config configs/method/lora.yaml --sequence configs/sequence/mtil.yaml
"""

from __future__ import annotations

from pathlib import Path

from vision_peft.commands.parser import CommandParser
from vision_peft.commands.sequence_run import SequenceRun


def main(command: str, argv: list[str]) -> None:
    usage = "vision-peft continual --config FILE ... --sequence FILE [--run FOLDER] [options of fit]"
    parser = CommandParser(command, __doc__, usage=usage)
    parser.add_argument("--sequence", required=True, help="YAML file with the list of tasks: name, source, template, maybe shots")
    parser.add_argument("--run", type=Path, default=Path("checkpoints/continual"), help="folder of the sequence: tasks, tables, pictures")
    given, words = parser.parse_known_args(argv)
    SequenceRun(words, given.sequence, given.run).go()
