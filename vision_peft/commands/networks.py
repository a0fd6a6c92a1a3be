"""Backbones rebuilt from what a run or an adapter folder says of them, and a way to run one network in another's place."""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from vision_peft.backbones.base import Backbone
from vision_peft.commands.config_errors import one_line, users_fault
from vision_peft.engine.store import CONFIG, read_config
from vision_peft.errors import UserError

RUN_CONFIG = "config.yaml"


def find_folders(folder: Path) -> tuple[Path, Path | None]:
    """The adapter folder and the run's config file (None if there is none) of a run or adapter folder."""
    if (folder / CONFIG).is_file():
        config = folder.parent / RUN_CONFIG
        return folder, config if config.is_file() else None
    if not (folder / RUN_CONFIG).is_file():
        raise UserError(f"{folder}: neither a run folder ({RUN_CONFIG} and adapter/) nor an adapter folder ({CONFIG})")
    config = folder / RUN_CONFIG
    named = (_read(config).get("adapter") or {}).get("folder")
    adapter = Path(named) if named else folder / "adapter"
    if not (adapter / CONFIG).is_file():
        raise UserError(f"{folder}: the run has no adapter at {adapter}: it did not finish, or it trained none")
    return adapter, config


def rebuild(adapter: Path, config: Path | None) -> Backbone:
    """The backbone of an adapter, on the meta device; the seed is set as in the run, so that load() draws the run's random weights."""
    described = read_config(adapter)["backbone"]
    if config is not None:
        settings = _read(config)
        torch.manual_seed(settings.get("seed_everything") or 0)
        try:
            return _instance(settings["model"]["init_args"]["backbone"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{config}: model.init_args.backbone is missing") from error
    if described.get("pretrained") is False:
        raise UserError(f"{adapter}: its backbone has random weights (pretrained: false), drawn by the run's seed: give the run folder")
    return _instance(_settings(adapter, described))


def on_random_input(backbone: Backbone, text: bool = False) -> Callable[[nn.Module], Tensor]:
    """A function that runs any copy of the backbone's network on its example(), and on two prompts with `text`."""
    given = backbone.example()
    tokens = backbone.tokenize(["a photo of a cat.", "a photo of a dog."]) if text else None

    def run(network: nn.Module) -> Tensor:
        twin = copy.copy(backbone)
        twin.__dict__["_modules"] = {**backbone._modules, "network": network}
        features = twin(*given)
        return features if tokens is None else torch.cat([features, twin.encode_text(tokens)])

    return run


def _read(config: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{config}: not valid YAML ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{config}: holds no configuration")
    return settings


def _settings(adapter: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """class_path and init_args out of what describe() wrote."""
    import vision_peft.backbones as known

    name = str(described.get("class", "")).rpartition(".")[2]
    if name not in known.__all__:
        raise UserError(f"{adapter / CONFIG}: backbone.class is {name!r}, known are {', '.join(known.__all__)}: give the run folder")
    accepted = inspect.signature(getattr(known, name).__init__).parameters
    return {"class_path": f"{known.__name__}.{name}", "init_args": {key: value for key, value in described.items() if key in accepted}}


def _instance(settings: Mapping[str, Any]) -> Backbone:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=Backbone)
    try:
        return parser.instantiate_classes(parser.parse_object({"backbone": settings})).backbone
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        if not users_fault(error):
            raise
        raise UserError(one_line(error, [])) from error
