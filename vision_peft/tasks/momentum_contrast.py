"""What momentum contrast is made of: a slowly following copy of what is trained, a queue of past keys, a head, a loss.

Source: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020; Chen et al., "Improved Baselines
with Momentum Contrastive Learning", 2020 (head, temperature).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vision_peft.backbones.base import decay_groups


class ProjectionHead(nn.Module):
    """Linear(d, d), ReLU, Linear(d, width), unit length: (B, d) -> (B, width). Thrown away after training."""

    def __init__(self, features: int, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, width))

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.layers(features).float(), dim=1)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        return decay_groups(self, lr, "head")


class FollowingCopy(nn.Module):
    """theta_k <- m theta_k + (1 - m) theta_q over all trained parameters of a module, as buffers.

    Only what is trained is copied: beside a frozen backbone the key encoder costs an adapter. Running statistics of BatchNorm
    are the copy's own, moved by its own batches.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        normalising = [name for name, each in module.named_modules() if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.training]
        owned = {name: each for name, each in module.named_buffers() if name.rpartition(".")[0] in normalising}
        self.averaged, self.owned = list(trained), list(owned)
        for name, tensor in {**trained, **owned}.items():
            self.register_buffer(_key(name), tensor.detach().clone())

    @torch.no_grad()
    def follow(self, module: nn.Module, momentum: float) -> None:
        parameters = dict(module.named_parameters())
        for name in self.averaged:
            self.get_buffer(_key(name)).lerp_(parameters[name].detach(), 1 - momentum)

    @torch.no_grad()
    def __call__(self, module: nn.Module, images: Tensor) -> Tensor:
        """module(images) with the copy's numbers in the place of the trained ones."""
        return functional_call(module, {name: self.get_buffer(_key(name)) for name in [*self.averaged, *self.owned]}, (images,))


class KeyQueue(nn.Module):
    """The latest keys (size, width), oldest overwritten first; at the start random directions."""

    def __init__(self, size: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, width, generator=generator), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Of all processes, in the same order everywhere, so that the queues stay equal."""
        size = len(self.keys)
        keys = keys[-size:]
        places = (self.place + torch.arange(len(keys), device=keys.device)) % size
        self.keys[places] = keys.to(self.keys)
        self.place.copy_((self.place + len(keys)) % size)


def contrast(query: Tensor, key: Tensor, queue: Tensor, temperature: float, same_image: bool) -> Tensor:
    """-log(exp(q k+ / t) / sum_k exp(q k / t)), mean over all pairs.

    Args:
        query, key: unit codes (pictures, versions, width).
        queue: (K, width) negatives.
        same_image: the keys of a picture's other versions are negatives too.
    """
    against_queue = query @ queue.T
    own = query @ key.transpose(1, 2)  # (pictures, versions, versions), positives on the diagonal
    if same_image:
        target = torch.arange(own.shape[1], device=own.device).expand(own.shape[0], -1)
    else:
        own = own.diagonal(dim1=1, dim2=2)[..., None]
        target = torch.zeros(own.shape[:2], dtype=torch.long, device=own.device)
    logits = torch.cat([own, against_queue], 2) / temperature
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


def _key(name: str) -> str:
    return name.replace(".", "/")  # names of buffers cannot hold dots
