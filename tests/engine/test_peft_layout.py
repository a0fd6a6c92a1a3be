"""PEFT itself is the oracle: a folder written by save_peft, loaded by PeftModel.from_pretrained, gives our outputs."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from contextlib import nullcontext

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
from vision_peft.engine.targets import expand
from vision_peft.errors import UserError

peft = pytest.importorskip("peft")

METHODS = {"lora": LoRA(rank=3, alpha=5), "comp_lora": CompLoRA(rank=2), "block_lora": BlockLoRA(rank=4)}
IMAGES = (2, 3, 16, 16)


def vit(depth: int = 2) -> nn.Module:
    network = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=2, mlp_ratio=2, num_classes=3)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)  # timm's start is so small that blocks hardly matter
    return network


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


class Cross(nn.Module):
    """nn.MultiheadAttention with projections of their own for q, k and v, which PEFT adapts as bare parameters only."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x[..., :4], x[..., :6], need_weights=False)[0]


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


class Sides(nn.Module):
    """Two networks side by side, all names of the first being ends of names of the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = vit()
        self.patch_embed, self.blocks, self.twin = first.patch_embed, first.blocks, vit()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.patch_embed(x)).mean(1)[:, :3] + self.twin(x)


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
@pytest.mark.parametrize("targets", [["*attn.q", "*attn.v"], "blocks.1.attn.k", ["blocks.0.attn.{q,k,v}", "*mlp*"], "embed"])
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


@pytest.mark.parametrize("targets", [["blocks.1.attn.q"], ["blocks.1.attn.q", "twin.blocks.{0,1}.attn.{q,v}"]])
def test_a_name_that_ends_as_another(targets, tmp_path):
    """blocks.1.attn.qkv is the end of twin.blocks.1.attn.qkv: neither the target nor its rank may spread."""
    model = check(Sides(), torch.randn(IMAGES), tmp_path / "peft", targets=targets)
    assert adapted(model) == {target.rpartition(".attn.")[0] + ".attn.qkv" for pattern in targets for target in expand(pattern)}


@pytest.mark.parametrize("targets", ["attn.q", ["attn.v", "attn.q", "attn.k"]])
def test_multihead_attention_with_separate_projections(targets, tmp_path):
    torch.manual_seed(0)
    check(Cross(), torch.randn(2, 3, 8), tmp_path / "peft", targets=targets)


@pytest.mark.parametrize("targets", ["part.mix", "part.{q,v}", "part.*"])
def test_bare_parameters(targets, tmp_path):
    torch.manual_seed(0)
    check(Around(part=Bare()), torch.randn(2, 3, 8), tmp_path / "peft", targets=targets)


def test_ranks_that_differ(tmp_path):
    """A fused slice, a full one, a bare matrix and a convolution in one network, with block-diagonal ranks 2, 6 and 4."""
    torch.manual_seed(0)
    network = Around(vit=vit(), lift=nn.Linear(3, 8), bare=Bare())
    check(network, torch.randn(IMAGES), tmp_path / "peft", targets=["*blocks.0.attn.q", "*blocks.1.attn.{q,k,v}", "*.proj", "bare*"])


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (1, 3), padding="same"),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 2, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4, padding=1),
        Conv2dSame(4, 6, 3, stride=2),
    ],
    ids=str,
)
def test_convolutions(conv, tmp_path):
    torch.manual_seed(0)
    network = Around(conv=copy.deepcopy(conv))
    with pytest.warns(UserWarning, match=r"1 grouped convolutions \(conv, ...\) take") if conv.groups > 1 else nullcontext():
        check(network, torch.randn(2, 4, 9, 9), tmp_path / "peft", LoRA(rank=1 if conv.groups == 4 else 2))


SHARED = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("network", "targets", "names"),
    [
        (Around(conv=nn.Conv2d(4, 6, 3, dilation=2)), "all", ["conv: ", "another function"]),
        (Around(conv=nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")), "all", ["conv: ", "another function"]),
        (Around(conv=StdConv2d(4, 6, 3)), "all", ["conv: ", "another function"]),
        (Around(embed=nn.Embedding(5, 4, max_norm=0.1)), "all", ["embed: ", "another function"]),
        (Around(one=SHARED, two=SHARED), "all", ["one: ", "several places"]),
        (Bare(), "mix", ["mix: ", "root"]),
        (Tower(), "blocks.1.attn.out", ["blocks.1.attn.out: ", "twice"]),
        (Around(attn=nn.MultiheadAttention(4, 2, kdim=2, vdim=2)), "attn.out", ["attn.out: ", "twice"]),
        (Around(a=Bare(), twin=Around(a=Bare())), "a.mix", ["a.mix: ", "twin.a.mix"]),
    ],
)
def test_what_peft_cannot_hold_is_refused_by_name(network, targets, names, tmp_path):
    attach(network, LoRA(rank=1), targets)
    with pytest.raises(UserError) as caught:
        save_peft(tmp_path / "peft", network, base_model=None)
    message = str(caught.value)
    assert all(name in message for name in [*names, "--to merged"]) and "\n" not in message
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_bare_parameters_above_each_other_are_refused(tmp_path):
    network = Around(part=Bare())
    network.part.out_proj = Bare()
    attach(network, LoRA(rank=1), ["part.mix", "part.out_proj.mix"])
    with pytest.raises(UserError, match=r"part\.out_proj\.mix: .*both part and part\.out_proj"):
        save_peft(tmp_path / "peft", network, base_model=None)


def test_a_parameter_read_outside_forward_is_refused(tmp_path):
    network = Around(part=Bare())
    sites = enumerate_sites(network, calls={"part": ("encode_text",)})
    attach(network, LoRA(rank=1), "part.mix", sites=sites)
    with pytest.raises(UserError, match=r"part\.mix: .*encode_text"):
        save_peft(tmp_path / "peft", network, base_model=None)


def test_a_parameter_that_a_module_reads_for_its_child_is_refused(tmp_path):
    """As in timm's BEiT, whose attention multiplies by self.qkv.weight itself: PEFT acts where qkv is called."""
    network = Around(part=Bare())
    linear = next(site for site in enumerate_sites(network) if site.name == "part.out_proj")
    site = dataclasses.replace(linear, reader="part", parameter="out_proj.weight")
    attach(network, LoRA(rank=1), "part.out_proj", sites=[site])
    with pytest.raises(UserError, match=r"part\.out_proj: .*Bare reads out_proj\.weight itself"):
        save_peft(tmp_path / "peft", network, base_model=None)


def test_a_method_that_is_not_low_rank_is_refused(tmp_path):
    network = vit()
    attach(network, SVFit(rank=2), "qv")
    with pytest.raises(UserError, match=r"svfit.*--to merged"):
        save_peft(tmp_path / "peft", network, base_model=None)


def test_config(tmp_path):
    network = vit(12)
    attach(network, LoRA(rank=2, alpha=7, dropout=0.3), ["blocks.{1,11}.attn.{q,v}", "blocks.1.mlp.fc1"])
    config = json.loads((save_peft(tmp_path / "peft", network, base_model="some/model") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model" and config["lora_dropout"] == 0 and config["inference_mode"]
    assert config["target_modules"] == ["blocks.1.attn.qkv", "blocks.1.mlp.fc1", "blocks.11.attn.qkv"]
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^blocks\.1\.mlp\.fc1": 2}


def test_merged_and_inactive_networks_export_the_same_file(tmp_path):
    network = vit()
    train(attach(network, CompLoRA(rank=2), "qv"))
    plain = (save_peft(tmp_path / "plain", network, base_model=None) / "adapter_model.safetensors").read_bytes()
    merge(network)
    assert (save_peft(tmp_path / "merged", network, base_model=None) / "adapter_model.safetensors").read_bytes() == plain


def test_the_global_generator_is_left_alone(tmp_path):
    network = vit()
    attach(network, LoRA(rank=2), "all")
    before = torch.get_rng_state()
    save_peft(tmp_path / "peft", network, base_model=None)
    assert torch.equal(torch.get_rng_state(), before)


def test_interrupted_writing_leaves_the_previous_folder_whole(tmp_path, monkeypatch):
    network = vit()
    adapters = attach(network, LoRA(rank=2), "qv")
    folder = save_peft(tmp_path / "peft", network, base_model=None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    train(adapters)
    monkeypatch.setattr(peft_layout.json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_peft(folder, network, base_model=None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["peft"], "no stage is left behind"
    monkeypatch.undo()
    save_peft(folder, network, base_model=None)
    assert (folder / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"adapter_config.json": '{"format": 1, "method": {}}'}])
def test_a_folder_of_something_else_is_not_replaced(content, tmp_path):
    network = vit()
    attach(network, LoRA(rank=2), "qv")
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="not a PEFT folder"):
        save_peft(tmp_path, network, base_model=None)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == content
