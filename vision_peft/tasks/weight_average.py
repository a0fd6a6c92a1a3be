"""The exponential moving average of what is trained, in whose place it can stand."""

from __future__ import annotations

import torch
from torch import nn


class WeightAverage(nn.Module):
    """theta_a <- d theta_a + (1 - d) theta, with d = min(decay, (1 + n) / (10 + n)) after n updates, so that the start is soon forgotten.

    Buffers, so that checkpoints hold it.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        parameters = dict(module.named_parameters())
        for name in self.names:
            self.register_buffer(_key(name), parameters[name].detach().clone())

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        n = int(self.updates)
        parameters = dict(module.named_parameters())
        for name in self.names:
            self.get_buffer(_key(name)).lerp_(parameters[name].detach(), 1 - min(self.decay, (1 + n) / (10 + n)))

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the average with the module's own values; a second call undoes the first."""
        parameters = dict(module.named_parameters())
        for name in self.names:
            own, average = parameters[name].data, self.get_buffer(_key(name))
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)


def _key(name: str) -> str:
    return name.replace(".", "/")  # names of buffers cannot hold dots
