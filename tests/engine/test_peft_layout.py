"""PEFT itself is the oracle: a folder written by save_peft, loaded by PeftModel.from_pretrained, gives our outputs."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from timm.layers import Conv2dSame, StdConv2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vision_peft.adapters.block_lora import BlockLoRA
from vision_peft.adapters.comp_lora import CompLoRA
from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.svfit import SVFit
from vision_peft.engine import peft_layout
from vision_peft.engine.install import attach, merge
from vision_peft.engine.peft_layout import save_peft
from vision_peft.engine.site import Site, enumerate_sites
from vision_peft.errors import UserError

peft = pytest.importorskip("peft")

METHODS = {"lora": LoRA(rank=3, alpha=5), "comp_lora": CompLoRA(rank=2), "block_lora": BlockLoRA(rank=4)}
IMAGES = (2, 3, 16, 16)


def vit(depth: int = 2) -> nn.Module:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=2, mlp_ratio=2, num_classes=3)


class Tower(nn.Module):
    """As open_clip's: nn.MultiheadAttention in residual blocks, a token table, a bare projection inside and one on the root's child."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(x, x, x, need_weights=False)[0]
            return x + self.mlp(x)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16, padding_idx=0)
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(self.embed(tokens))


class Bare(nn.Module):
    """A fused projection as a bare parameter, as in open_clip's own Attention, with a Linear below and a second bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(24, 8))
        self.out_proj = nn.Linear(8, 8)
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x @ self.in_proj_weight.mT).chunk(3, -1)
        return self.out_proj((q * k + v) @ self.mix)


class Around(nn.Module):
    """Calls its parts one after the other, each under the name given."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


def train(adapters: nn.Module) -> None:
    """Put every trained tensor off its start, so that no part of the update is zero by chance."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def check(network: nn.Module, x: Tensor, folder, method=None, targets="all", sites: list[Site] | None = None) -> nn.Module:
    """Export, load by PEFT into an untouched copy, compare; gives the PEFT model."""
    network.eval()
    bare = copy.deepcopy(network)
    with torch.no_grad():
        before = network(x)
        train(attach(network, method or LoRA(rank=2), targets, sites=sites))
        ours = network(x)
    save_peft(folder, network, base_model="some/model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys and patterns that match nothing
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups > 1")
        theirs = peft.PeftModel.from_pretrained(bare, folder).eval()
    with torch.no_grad():
        assert (ours - before).abs().max() > 1e-2, "the adapters do nothing: nothing is tested"
        torch.testing.assert_close(theirs(x), ours, rtol=1e-5, atol=1e-5)
    return theirs


def adapted(model: nn.Module) -> set[str]:
    """Names of the modules that PEFT wrapped, as the bare network calls them."""
    prefix = "base_model.model."
    names = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    return {name.removeprefix(prefix).replace(".base_layer", "") for name in names}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", ["qv", ["blocks.1.attn.*", "blocks.1.mlp.*"], "patch_embed.proj", "all"])
def test_vision_transformer(method, targets, tmp_path):
    torch.manual_seed(0)
    check(vit(), torch.randn(IMAGES), tmp_path / "peft", METHODS[method], targets)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", [["*attn.q", "*attn.v"], "blocks.1.attn.out", "blocks.0.*", "embed", "all"])
def test_multihead_attention(method, targets, tmp_path):
    torch.manual_seed(0)
    check(Tower(), torch.randint(0, 11, (2, 5)), tmp_path / "peft", METHODS[method], targets)


@pytest.mark.parametrize("chosen", [["blocks.1"], [f"blocks.{block}" for block in range(12) if block != 1], ["blocks.1", "blocks.11"]])
def test_only_the_adapted_blocks_of_twelve(chosen, tmp_path):
    torch.manual_seed(0)
    targets = [f"{block}.{rest}" for block in chosen for rest in ("attn.q", "attn.v", "mlp.fc1")]
    model = check(vit(12), torch.randn(IMAGES), tmp_path / "peft", targets=targets)
    assert adapted(model) == {f"{block}.{rest}" for block in chosen for rest in ("attn.qkv", "mlp.fc1")}
    ranks = {name: module.r["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert all(rank == (4 if name.endswith("qkv") else 2) for name, rank in ranks.items())  # two slices of rank 2


@pytest.mark.parametrize("targets", [["blocks.1.attn.q"], ["blocks.1.attn.q", "blocks.1.attn.v", "twin.blocks.1.attn.q"]])
def test_a_name_that_ends_as_another(targets, tmp_path):
    """blocks.1.attn.qkv is the end of twin.blocks.1.attn.qkv: neither the target nor its rank may spread."""
    torch.manual_seed(0)
    network = vit()
    network.norm = Around(norm=network.norm, twin=nn.Identity())
    network.twin = vit()
    network.forward = None
    both = Sides(network)
    model = check(both, torch.randn(IMAGES), tmp_path / "peft", targets=targets)
    assert adapted(model) == {target[:-1] + "qkv" for target in targets}


class Sides(nn.Module):
    """Two networks side by side, the second named as if it were nested in the first."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.blocks = vit().patch_embed, vit().blocks
        self.twin = vit()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.patch(x)).mean(1) @ torch.ones(16, 3) / 16 + self.twin(x)
