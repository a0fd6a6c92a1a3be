"""Small networks, one for every kind of site; each with its input, how it is run, and what is targeted."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn

from vision_peft.engine.adapter import Method, find_method
from vision_peft.engine.evidence import collect
from vision_peft.engine.install import attach
from vision_peft.engine.site import Site, enumerate_sites
from vision_peft.engine.targets import fused_qkv, resolve


@dataclass
class Kind:
    build: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    targets: str | list[str] = "all"
    calls: dict[str, tuple[str, ...]] | None = None
    shows_input: bool = True  # whether adapters get to see what the layer multiplies

    def network(self) -> nn.Module:
        torch.manual_seed(3)
        network = self.build()
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)  # nn.MultiheadAttention starts its biases at zero, which would hide them
        return network

    def sites(self, network: nn.Module) -> list[Site]:
        return enumerate_sites(network, fused=fused_qkv, calls=self.calls)

    def forward(self) -> Callable[[nn.Module], Tensor]:
        x = self.input()
        return lambda network: network.encode(x) if hasattr(network, "encode") else network(x)

    def suits(self, method: Method) -> bool:
        with torch.device("meta"):
            return (self.shows_input or not needs_view(method)) and any(method.suits(site) for site in self.sites(self.build()))


class Fused(nn.Module):
    """timm's attention: q, k and v are row blocks of one Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = timm_vit.Attention(16, num_heads=2, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


class Multihead(nn.Module):
    def __init__(self, batch_first: bool, mask: str, need_weights: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=batch_first, bias=bias)
        self.mask, self.need_weights = mask, need_weights

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1 if self.attn.batch_first else 0]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        masks = {"none": None, "bool": causal, "float": torch.zeros(length, length, device=x.device).masked_fill(causal, float("-inf"))}
        return self.attn(x, x, x, need_weights=self.need_weights, attn_mask=masks[self.mask])[0]


class Cross(nn.Module):
    """Attention between two sequences: what the re-expressed path must leave to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x[:, :3], x[:, 2:], x[:, 2:], need_weights=False)[0]


class Bare(nn.Module):
    """A projection that no layer owns, read by the root's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.randn(12, 10) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.proj


class Encoder(Bare):
    """The same, read by a method that is not forward, as CLIP's text projection."""

    encode = Bare.forward
    forward = None


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x)


def _convs(**options: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, **options), nn.GELU(), nn.Conv2d(8, 8, 3, stride=2, **options))


def _tokens() -> Tensor:
    return torch.randn(3, 6, 16)


def _image() -> Tensor:
    return torch.randn(2, 4, 7, 7)


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8, bias=False)), lambda: torch.randn(5, 12)),
    "linear_inplace": Kind(lambda: nn.Sequential(nn.Linear(12, 10), nn.ReLU(inplace=True), nn.Linear(10, 8)), lambda: torch.randn(5, 12)),
    "fused_qkv": Kind(Fused, _tokens, "attn.{q,k,v}"),
    "fused_qv": Kind(Fused, _tokens, ["attn.q", "attn.v", "attn.proj"]),
    "mha": Kind(lambda: Multihead(True, "none"), _tokens),
    "mha_causal_bool": Kind(lambda: Multihead(True, "bool"), _tokens, "attn.*"),
    "mha_seq_first_causal_float": Kind(lambda: Multihead(False, "float"), _tokens, "attn.*"),
    "mha_need_weights": Kind(lambda: Multihead(True, "bool", need_weights=True), _tokens, "qv", shows_input=False),
    "mha_cross": Kind(Cross, _tokens, "attn", shows_input=False),
    "encoder_layers": Kind(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 20, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False),
        _tokens,
    ),
    "conv": Kind(_convs, _image),
    "conv_grouped": Kind(lambda: _convs(groups=2), _image, "conv"),
    "conv_depthwise": Kind(lambda: _convs(groups=4), _image, "conv"),
    "bare": Kind(Bare, lambda: torch.randn(5, 12)),
    "bare_method": Kind(Encoder, lambda: torch.randn(5, 12), calls={"": ("encode",)}),
    "embedding": Kind(Words, lambda: torch.arange(20).view(4, 5)),
}


def small(name: str) -> Method:
    """The method of that name with its defaults, but of a size that fits a tiny layer."""
    cls = find_method(name)
    rank = inspect.signature(cls).parameters.get("rank")
    return cls(**({} if rank is None or rank.default is None else {"rank": 2}) | cls.tiny)


def needs_view(method: Method) -> bool:
    """Whether it must see what a layer multiplies, in training or beforehand."""
    return method.reads_input or "covariance" in method.evidence


def adapted(network: nn.Module, method: Method, run: Callable[[nn.Module], Tensor], targets: str | list[str] = "all", **options):
    """attach() with whatever evidence the method asks for, collected from one run; without warnings about dropout."""
    if method.evidence:
        sites = options.get("sites") or enumerate_sites(network, fused=fused_qkv)
        batches = [None]
        options["evidence"] = collect(
            network, resolve(targets, sites, method), method.evidence, batches, lambda _: run(network).square().mean()
        )
    return quietly(attach, network, method, targets, **options)


def quietly(function: Callable, *args, **kwargs):
    """Without the (tested elsewhere) warning that a layer cannot apply the method's dropout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dropout of")
        return function(*args, **kwargs)
