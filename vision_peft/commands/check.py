"""`vision-peft check`: the contract of a config's method, proved on its own backbone with random images, in seconds."""

from __future__ import annotations

from vision_peft.commands.columns import columns
from vision_peft.commands.networks import on_random_input
from vision_peft.commands.parser import CommandParser
from vision_peft.engine.contract import run_contract
from vision_peft.engine.targets import resolve
from vision_peft.errors import UserError

USAGE = "vision-peft check --config FILE [--config FILE ...] [--KEY VALUE ...]"


def main(command: str, argv: list[str]) -> int:
    parser = CommandParser(command, __doc__, USAGE)
    parser.add_argument("--config", "-c", metavar="FILE", action="append", required=True, help="as for fit, with the same overrides")
    given, overrides = parser.parse_known_args(argv)
    from vision_peft.commands.run import make_cli  # lightning: takes seconds

    cli = make_cli("fit", [word for config in given.config for word in ("--config", config)] + overrides, run=False)
    backbone, method = cli.model.backbone, cli.adapter.method
    if method is None:
        raise UserError("adapter.method is null: there is no method to check")
    backbone.load()
    sites = resolve(cli.adapter.targets, backbone.sites(), method)
    print(f"{method!r} on {len(sites)} sites of {backbone.describe()['name']}")
    forward = on_random_input(backbone, text=any(site.target.startswith("text.") for site in sites))
    checks = run_contract(backbone.network, backbone.sites(), method, forward, cli.adapter.targets, seed=cli.adapter.seed)
    print(columns([("property", "", ""), *((each.name, "ok" if each.passed else "FAILED", each.detail) for each in checks)]))
    failed = sum(not each.passed for each in checks)
    print(f"\n{len(checks)} properties, {failed} failed")
    return 1 if failed else 0
