"""The entry of `vision-peft`: finds the command, imports only that, and answers bad input with one line and exit code 2."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module

from vision_peft.errors import UserError, nearest

# command -> (module under vision_peft.commands, one line of help)
COMMANDS = {
    "fit": ("run", "train: put a method on a backbone, adapt it to a few images, write an adapter folder"),
    "validate": ("run", "evaluate on the validation split"),
    "test": ("run", "evaluate on the test split; pictures and per-class figures go into the run's folder"),
    "predict": ("run", "apply to a folder of images and write predictions.csv"),
    "methods": ("methods", "list the methods with their flags"),
    "backbones": ("backbones", "list backbones by pattern"),
    "targets": ("targets", "list the layers of a config's backbone and what its patterns match"),
    "check": ("check", "prove the contract of a config's method on its own backbone, in seconds"),
    "export": ("export", "write an adapter as merged weights or in Hugging Face PEFT's layout"),
    "import": ("import_peft", "read a Hugging Face PEFT folder (LoRA, DoRA, LoHa, LoKr) as an adapter of a config's backbone"),
    "merge": ("merge", "fold one adapter into a backbone file"),
    "compare": ("compare", "methods x learning rates x seeds on one task, chosen on the val split: table, plot, report"),
    "table": ("table", "sets x shots x seeds x methods at fixed settings: the table of the few-shot papers"),
    "continual": ("continual", "one task after another on the same model: accuracy matrix, forgetting, ranks"),
    "quality": ("quality", "image quality without a reference: features, a regressor on opinion scores, scores for any picture"),
    "sample": ("sample", "pictures of a generator: frozen, with each adapter, with a mix, from the same seeds"),
    "data": ("data", "the known sets: what is there, and preparing one from its public archives"),
}
HELP = """usage: vision-peft COMMAND [options]

Parameter-efficient adaptation of vision and vision-language models.

commands:
{commands}

`vision-peft COMMAND --help` tells the options of one. A run is described by one or more YAML files, later ones first in rank:
  vision-peft fit --config configs/quickstart.yaml
  vision-peft fit --config configs/task/fewshot_clip.yaml --config configs/method/comp_lora.yaml --trainer.devices 8
  vision-peft fit --resume checkpoints/quickstart
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 where `check` found a breach, or 2 for bad input."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:10s} {text}" for name, (_, text) in COMMANDS.items())), end="")
        return 0
    if words[0] == "--version":
        import vision_peft

        print(vision_peft.__version__)
        return 0
    warnings.formatwarning = lambda message, *where, **more: f"vision-peft: warning: {message}\n"  # one line, without our source
    try:
        command, rest = _split(words)
        return import_module(f"vision_peft.commands.{COMMANDS[command][0]}").main(command, rest) or 0
    except UserError as error:
        print(f"vision-peft: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _split(words: list[str]) -> tuple[str, list[str]]:
    """The command and its options; options may stand before the command as well (`--config x.yaml fit`)."""
    for place, word in enumerate(words):
        if word in COMMANDS:
            return word, words[:place] + words[place + 1 :]
    first = next((word for word in words if not word.startswith("-")), words[0])
    raise UserError(f"unknown command {first!r}{nearest(first, COMMANDS)}")


if __name__ == "__main__":
    sys.exit(main())
