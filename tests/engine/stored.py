"""A small network with stirred adapters, their folder, and ways to spoil it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kinds import adapted, small
from safetensors.torch import load_file, save_file
from torch import nn

from vision_peft.engine import store
from vision_peft.engine.install import installed
from vision_peft.engine.store import load_adapter
from vision_peft.errors import UserError


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 6), nn.BatchNorm1d(6)).eval()


def trained(network: nn.Module, method: str = "lora", **options) -> nn.Module:
    adapters = adapted(network, small(method), lambda network: network(x()), **options)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapters


def x() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(2))


def edit(folder: Path, **changes) -> None:
    path = folder / store.CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / store.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / store.WEIGHTS)


def assert_refused(folder: Path, match: str, network: nn.Module | None = None, **options) -> None:
    """Refused with one line that names the folder, and the network is as it was."""
    network = network if network is not None else build()
    before, flags = network(x()), [p.requires_grad for p in network.parameters()]
    with pytest.raises(UserError, match=match) as caught:
        load_adapter(network, folder, **options)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not installed(network)
    assert torch.equal(network(x()), before)
    assert [p.requires_grad for p in network.parameters()] == flags
