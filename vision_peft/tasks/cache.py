"""Hidden states of the unchanging first part of a backbone, computed once and handed out instead of pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from vision_peft.backbones.base import Backbone
from vision_peft.user_cache import cache_folder, kept_tensors


class HiddenStates(Dataset):
    """A dataset of items with the hidden state that enters block `block` in the place of the image, under the same keys.

    Exact for data whose pictures do not change from epoch to epoch, or cycle through a fixed number of views.

    Args:
        data: has `views` (not None), `at`, `with_image` and `identity`, as ImageDataset does.
        backbone: loaded; every layer before `block` stays as it is while this is used.
        block: 0 < block <= backbone.num_blocks.
        disk: keep the states in the user's cache as well, under a key made of everything they depend on.
        identity: the backbone's fingerprint, part of that key.
        precision: the trainer's precision plugin: the states are those that training would see under its autocast.
    """

    def __init__(self, data: Any, backbone: Backbone, block: int, device: torch.device, precision: Any, disk: bool, identity: str) -> None:
        self.data, self.views = data, data.views
        path = _path(data, backbone, block, identity, precision) if disk else None

        def compute() -> dict[str, Tensor]:
            return {"states": self._compute(backbone, block, device, precision)}

        self.states = (compute() if path is None else kept_tensors(path, compute))["states"]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Any) -> Any:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        return self.data.with_image(key, self.states[epoch % self.views, index])

    def _compute(self, backbone: Backbone, block: int, device: torch.device, precision: Any) -> Tensor:
        """(views, N, ...) on the CPU, in the type the network gives."""
        training = backbone.training
        backbone.eval()
        views = []
        with torch.inference_mode(False), torch.no_grad(), precision.forward_context():
            for view in range(self.views):
                keys = [(index, view) for index in range(len(self.data))]
                loader = DataLoader(_Keyed(self.data, keys), batch_size=64)
                states = [backbone.prefix(batch.to(device), block).cpu() for batch in tqdm(loader, "frozen part", disable=len(keys) < 500)]
                views.append(torch.cat(states))
        backbone.train(training)
        return torch.stack(views)


class _Keyed(Dataset):
    """The pictures of a dataset under a list of (index, epoch) keys."""

    def __init__(self, data: Any, keys: list[tuple[int, int]]) -> None:
        self.data, self.keys = data, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: int) -> Tensor:
        return self.data.at(*self.keys[place])


def _path(data: Any, backbone: Backbone, block: int, identity: str, precision: Any) -> Path:
    facts = [data.identity(), identity, block, backbone.describe(), precision.precision]
    return cache_folder("hidden_states") / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.safetensors"
