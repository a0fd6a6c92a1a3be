"""Write the effective weights of an adapted network as a plain checkpoint of its backbone, which then needs none of this project."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vision_peft.engine.install import _find
from vision_peft.errors import UserError

_SUFFIXES = (".safetensors", ".pt", ".pth")


def save_merged(path: str | os.PathLike[str], network: nn.Module) -> Path:
    """Write the weights that the active adapters give, under the network's own state_dict keys and in its own types.

    The network is read, never written, so it stays as it was whatever fails. An existing file is replaced only when all is written.

    Args:
        path: `.safetensors`, or `.pt` / `.pth` for torch.load(weights_only=True).

    Raises:
        UserError: one line, for another suffix, a method that cannot be merged, or a tensor that a layer without adapters reads too.
    """
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise UserError(f"{target}: a merged file ends in {', '.join(_SUFFIXES)}")
    if target.is_dir():
        raise UserError(f"{target}: is a folder, and the merged weights are one file")
    state = {key: value.detach().cpu().contiguous().clone() for key, value in effective_state(network).items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if target.suffix == ".safetensors":
            save_file(state, staging / target.name, {"format": "pt"})
        else:
            torch.save(state, staging / target.name)
        (staging / target.name).chmod(0o644)  # safetensors gives 0600
        os.replace(staging / target.name, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


@torch.no_grad()
def effective_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's state_dict with every adapted parameter at its effective value; nothing is changed in place.

    Computed in float32 and rounded once to the parameter's type. Merged networks give their state_dict as it is.
    """
    found = _find(network)
    for name in found.state.mix:
        method = found.sets[name].method
        if method.merge == "impossible":
            raise UserError(f"method {method.name} cannot be merged into the weights of the backbone")
        found.sets[name].eval()  # what is random while training is not merged
    state: dict[str, Tensor] = dict(network.state_dict())
    if found.state.merged:
        return state
    keys: dict[int, list[str]] = {}  # all state_dict keys of a parameter
    for key, parameter in network.named_parameters(remove_duplicate=False):
        keys.setdefault(id(parameter), []).append(key)
    for path, reader in found.readers.items():
        for parameter, view in reader.views.items():
            if not view.active():
                continue
            key = f"{path}.{parameter}" if path else parameter
            tensor = network.get_parameter(key)
            value = view.effective(tensor)
            for alias in keys[id(tensor)]:
                # a layer under two names is one layer; another layer with the same tensor reads the frozen value
                if _owner(network, alias) is not _owner(network, key):
                    raise UserError(f"{key}: its tensor is also {alias}, which is not adapted: one merged file cannot hold both values")
                state[alias] = value
    return state


def _owner(network: nn.Module, key: str) -> nn.Module:
    return network.get_submodule(key.rpartition(".")[0])
