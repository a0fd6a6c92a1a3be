"""`vision-peft targets`: the layers of a backbone, what a config's patterns match, and what that costs; reads no weights."""

from __future__ import annotations

from collections.abc import Sequence

from vision_peft.commands.columns import columns
from vision_peft.commands.parser import CommandParser
from vision_peft.engine.adapter import Method, find_method
from vision_peft.engine.site import Site
from vision_peft.engine.targets import PRESETS, resolve, table
from vision_peft.errors import UserError

USAGE = "vision-peft targets (--config FILE [--KEY VALUE ...] | --backbone NAME) [--targets PATTERN ...] [--all]"


def main(command: str, argv: list[str]) -> None:
    parser = CommandParser(command, __doc__, USAGE)
    parser.add_argument("--config", "-c", metavar="FILE", action="append", help="as for fit, with the same overrides")
    parser.add_argument("--backbone", metavar="NAME", help="instead of a config: a name that `vision-peft backbones` lists for Vit")
    parser.add_argument("--targets", metavar="PATTERN", nargs="+", help="try these presets or patterns in place of the config's")
    parser.add_argument("--all", action="store_true", help="list every layer with its shape as well")
    given, overrides = parser.parse_known_args(argv)
    if given.backbone and (given.config or overrides):
        raise UserError(f"--backbone stands for a whole config: leave out {'--config' if given.config else overrides[0]}")
    if not given.backbone and not given.config:
        raise UserError("give --config FILE, or --backbone NAME")
    sites, method, targets = _of_backbone(given.backbone) if given.backbone else _of_config(given.config, overrides, given.targets)
    targets = given.targets or targets
    if given.all:
        rows = [(site.name, site.kind, site.role, " x ".join(map(str, site.shape))) for site in sites]
        print(columns([("layer", "kind", "role", "shape"), *rows]), end="\n\n")
    print(f"{method!r} on {targets if isinstance(targets, str) else ' '.join(targets)}")
    print(table(resolve(targets, sites, method), method), end="\n\n")
    print(columns([("preset", "sites"), *((name, _count(name, sites, method)) for name in _presets(sites))]))
    print("\nPatterns are globs over layer names, with braces and ranges: vision.{6..8}.attn.{q,v}; layers and shapes: --all")


def _of_backbone(name: str) -> tuple[list[Site], Method, str]:
    from vision_peft.backbones import Vit

    return Vit(name).sites(), find_method("lora")(), "all"


def _of_config(configs: list[str], overrides: list[str], targets: list[str] | None) -> tuple[list[Site], Method, str | list[str]]:
    from vision_peft.commands.run import make_cli  # lightning: takes seconds

    words = [word for config in configs for word in ("--config", config)] + overrides
    words += [f"--adapter.targets=[{', '.join(map(repr, targets))}]"] if targets else []
    cli = make_cli("fit", words, run=False)
    return cli.model.backbone.sites(), cli.adapter.method or find_method("lora")(), cli.adapter.targets


def _presets(sites: Sequence[Site]) -> list[str]:
    """The presets, and those of each tower where there are two."""
    towers = list(dict.fromkeys(site.target.split(".")[0] for site in sites if site.target.split(".")[0] in ("vision", "text")))
    return [*PRESETS, *(f"{tower}:{name}" for tower in towers if len(towers) > 1 for name in PRESETS)]


def _count(preset: str, sites: Sequence[Site], method: Method) -> int:
    try:
        return len(resolve(preset, sites, method))
    except UserError:  # matches nothing here
        return 0
