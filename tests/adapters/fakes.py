"""Sites without a network, and adapters in float64 as if trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Adapter, Evidence, Method
from vision_peft.engine.site import Site


def site(*shape: int, name: str = "vision.0.attn.q", role: str = "weight", kind: str = "linear") -> Site:
    return Site(name, name, "reader", "weight", shape, role=role, kind=kind)


def clip_vit_b16() -> list[Site]:
    """q, k, v of the 12 blocks of both towers."""
    widths = {"vision": 768, "text": 512}
    return [site(d, d, name=f"{tower}.{i}.attn.{part}") for tower, d in widths.items() for i in range(12) for part in "qkv"]


def count(method: Method, sites: list[Site]) -> int:
    return sum(method.count(each) for each in sites)


def trainables(method: Method, each: Site) -> int:
    """Counted on the adapter that is really built."""
    return sum(p.numel() for p in method.adapter(each, None).parameters() if p.requires_grad)


def started(method: Method, W: Tensor, seed: int = 0) -> Adapter:
    """The method's adapter on W, in W's type, at its start."""
    adapter = method.adapter(site(*W.shape), None).to(W.dtype)
    with torch.no_grad():
        adapter.initialize(W, Evidence(torch.Generator().manual_seed(seed)))
    return adapter


def moved(method: Method, W: Tensor) -> Adapter:
    """The same after some training: every parameter off its start."""
    adapter = started(method, W)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    return adapter


def weight64(rows: int = 12, columns: int = 9) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64)


def delta(adapter: Adapter, W: Tensor) -> Tensor:
    with torch.no_grad():
        return adapter.weight(W) - W


def regress(network: nn.Module, adapters: nn.Module, x: Tensor, target: Tensor, lr: float, steps: int = 60) -> list[float]:
    """Squared errors over some steps of AdamW on the adapters alone."""
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (network(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(adapter: Adapter, W: Tensor, G: Tensor) -> dict[str, Tensor]:
    """Gradients of <G, W'>: G stands for the gradient of a loss in the effective weight."""
    adapter.zero_grad()
    (adapter.weight(W) * G).sum().backward()
    return {name: parameter.grad for name, parameter in adapter.named_parameters()}
