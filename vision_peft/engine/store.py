"""The adapter folder: adapter_model.safetensors, adapter_config.json and README.md; written atomically, loaded strictly, never executed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vision_peft.engine.adapter import find_method
from vision_peft.engine.adapter_set import AdapterSet
from vision_peft.engine.fingerprint import fingerprint
from vision_peft.engine.install import Installation, _find, _install, _known, overlap
from vision_peft.engine.site import Site, enumerate_sites, whole_sites
from vision_peft.engine.targets import fused_qkv
from vision_peft.errors import UserError

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
FORMAT = 1


def save_adapter(
    folder: str | os.PathLike[str],
    network: nn.Module,
    *,
    name: str = "default",
    seed: int = 0,
    backbone: Mapping[str, Any] | None = None,
    resized: frozenset[str] = frozenset(),
    parts: Mapping[str, nn.Module] | None = None,
    extra: Mapping[str, Any] | None = None,
    card: str = "",
) -> Path:
    """Write the adapter set `name` of `network`, those that act beside it on other tensors, and trained `parts` such as a head.

    An existing adapter folder is replaced only when all is written; a folder that holds anything else is left alone (UserError).

    Args:
        seed: the one given to attach(): what bases are redrawn from.
        backbone: what identifies the backbone to a reader of the config; the fingerprint is added here.
        resized: state_dict keys that depend on the image size.
        extra: JSON-ready facts to keep in the config (class names, metrics).
        card: text of README.md.
    """
    found = _find(network)
    _known(found, name)
    adapters = found.sets[name]
    tensors = {f"parts.{part}.{key}": value for part, module in (parts or {}).items() for key, value in module.state_dict().items()}
    tensors |= adapters.state_dict()
    others = _beside(found, name)
    tensors |= {f"beside.{each}.{key}": value for each, other in others.items() for key, value in other.state_dict().items()}
    own = {
        "format": FORMAT,
        **_described(adapters),
        "beside": {each: _described(other) for each, other in others.items()},
        "seed": seed,
        "backbone": {**(backbone or {"class": type(network).__name__}), "fingerprint": fingerprint(network, resized)},
        "parts": sorted(parts or {}),
    }
    if clash := own.keys() & (extra or {}).keys():
        raise ValueError(f"extra holds {', '.join(sorted(clash))}, which the adapter's own description needs")
    config = {**own, **(extra or {})}
    with staged_folder(folder) as staging:
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, staging / WEIGHTS)
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (staging / CARD).write_text(card or f"# {adapters.method.name} adapter\n")
    return Path(folder)


def _beside(found: Installation, name: str) -> dict[str, AdapterSet]:
    """The other active sets, where `name` is active too; a mix on the same tensors is no such company."""
    if name not in found.state.mix:
        return {}
    others = {each: found.sets[each] for each in found.state.mix if each != name}
    return {each: other for each, other in others.items() if overlap(found.sets[name].sites, other.sites) is None}


def _described(adapters: AdapterSet) -> dict[str, Any]:
    """What a set is made of, JSON-ready; `_restored` makes it again."""
    method = {"name": adapters.method.name, "hyperparameters": adapters.method.hyperparameters()}
    return {"method": method, "sites": [site.name for site in adapters.sites]}


@contextmanager
def staged_folder(
    folder: str | os.PathLike[str], files: frozenset[str] = frozenset({WEIGHTS, CONFIG, CARD}), kind: str = "an adapter folder"
) -> Iterator[Path]:
    """A new folder beside `folder` to write into, which takes its place, at once and whole, when the block ends without an error.

    Args:
        files: names that a folder of this kind holds.

    Raises:
        UserError: `folder` exists and holds something else: it will not be replaced.
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and {each.name for each in target.iterdir()} <= files):
        raise UserError(f"{target}: exists and is not {kind}: choose another one")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        for file in staging.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors gives 0600, and an adapter is there to be shared
        staging.chmod(0o755)
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_folder(staging: Path, target: Path) -> None:
    """Put a finished folder in place. An old one is moved aside first and removed last, so one of the two is always whole."""
    if not target.exists():
        os.replace(staging, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        os.replace(target, aside / "old")
        try:
            os.replace(staging, target)
        except OSError:
            os.replace(aside / "old", target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_adapter(
    network: nn.Module,
    folder: str | os.PathLike[str],
    *,
    sites: Sequence[Site] | None = None,
    name: str = "default",
    resized: frozenset[str] = frozenset(),
    parts: Mapping[str, nn.Module] | None = None,
) -> AdapterSet:
    """Attach the adapter sets stored in `folder` and fill `parts`; strict in keys, shapes, backbone and recomputed bases.

    Returns:
        The set of the folder's method; sets that were active beside it are attached and active under their own names.

    Raises:
        UserError: one line naming the folder and what does not fit; the network is then as it was.
    """
    config, tensors = read_config(folder), read_tensors(folder)
    installation = _find(network, missing_ok=True) or Installation(network)
    if installation.state.merged:
        raise UserError("adapters are merged into the network: unmerge() before loading others")
    for each in (name, *config["beside"]):
        if each in installation.sets:
            raise UserError(f"an adapter set named {each!r} is already attached: detach() it or choose another name")
    there = fingerprint(network, resized)
    if config["backbone"]["fingerprint"] != there:
        described = {key: value for key, value in config["backbone"].items() if key != "fingerprint"}
        raise UserError(f"{folder}: the adapter belongs to another backbone ({described}): fingerprints differ")
    listed = sites if sites is not None else enumerate_sites(network, fused=fused_qkv)
    known = {site.name: site for site in [*listed, *whole_sites(listed)]}
    device = next(network.parameters()).device
    adapters = _restored(folder, config, known, network, config["seed"], device)
    others = {each: _restored(folder, described, known, network, config["seed"], device) for each, described in config["beside"].items()}
    own = {key: value for key, value in tensors.items() if not key.startswith(("parts.", "beside."))}
    load_strictly(adapters, own, f"{folder}/{WEIGHTS}")
    for each, other in others.items():
        load_strictly(other, _below(tensors, f"beside.{each}."), f"{folder}/{WEIGHTS} ({each})")
    undeclared = {key.split(".")[1] for key in tensors if key.startswith("parts.")} - set(config["parts"])
    if undeclared:
        raise UserError(f"{folder}/{WEIGHTS}: holds part {min(undeclared)!r}, which {CONFIG} does not declare")
    for part in config["parts"]:
        if part in (parts or {}):
            load_strictly(parts[part], _below(tensors, f"parts.{part}."), f"{folder}/{WEIGHTS} ({part})")
    network.requires_grad_(False)
    _install(installation, name, adapters)
    for each, other in others.items():
        _install(installation, each, other, beside=True)
    return adapters


def _restored(
    folder: str | os.PathLike[str],
    described: Mapping[str, Any],
    known: Mapping[str, Site],
    network: nn.Module,
    seed: int,
    device: torch.device,
) -> AdapterSet:
    """A set of the described method on the described sites, at its start."""
    for each in described["sites"]:
        if each not in known:
            raise UserError(f"{folder}: the backbone has no layer {each!r}, which the adapter adapts")
    adapters = AdapterSet(_method(folder, described), [known[each] for each in described["sites"]]).to(device)
    adapters.initialize(network, seed)
    return adapters


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The folder's adapter_config.json, checked for the keys that loading needs."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG} in this folder: not an adapter folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    kinds = {"format": int, "method": dict, "sites": list, "seed": int, "backbone": dict, "parts": list}
    for key, kind in kinds.items():
        if not isinstance(config, dict) or key not in config:
            raise UserError(f"{path}: key {key!r} is missing: not an adapter folder of this project")
        if not isinstance(config[key], kind):
            raise UserError(f"{path}: {key} is {config[key]!r}, expected a {kind.__name__}")
    for key, inner in (("method", "name"), ("method", "hyperparameters"), ("backbone", "fingerprint")):
        if inner not in config[key]:
            raise UserError(f"{path}: key {key + '.' + inner!r} is missing: not an adapter folder of this project")
    config.setdefault("beside", {})  # folders of earlier versions hold one set
    for each, described in config["beside"].items():
        if not isinstance(described, dict) or not {"method", "sites"} <= described.keys():
            raise UserError(f"{path}: beside.{each} has no method and sites: not an adapter folder of this project")
    if config["format"] != FORMAT:
        raise UserError(f"{path}: format {config['format']} is not known to this version (it reads {FORMAT})")
    return config


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder}: {WEIGHTS} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})") from error


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """load_state_dict where a missing, extra or misshapen key is one clear line that names `source` and the key."""
    own = module.state_dict()
    for key in sorted(own.keys() | tensors.keys()):
        if key not in tensors:
            raise UserError(f"{source}: key {key!r} is missing")
        if key not in own:
            raise UserError(f"{source}: key {key!r} is not expected")
        if own[key].shape != tensors[key].shape:
            raise UserError(f"{source}: {key!r} has shape {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}")
    module.load_state_dict(dict(tensors))


def _method(folder: str | os.PathLike[str], config: Mapping[str, Any]) -> Any:
    try:
        return find_method(config["method"]["name"])(**config["method"]["hyperparameters"])
    except (TypeError, UserError) as error:
        raise UserError(f"{Path(folder) / CONFIG}: method {config['method']['name']!r} cannot be made: {error}") from error
