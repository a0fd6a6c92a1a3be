"""A merged file is a plain checkpoint of the backbone: strict to load, equal in output, and writing it touches nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vision_peft.adapters.comp_lora import CompLoRA
from vision_peft.adapters.dora import DoRA
from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.svfit import SVFit
from vision_peft.engine import merged as module
from vision_peft.engine.install import activate, attach, merge
from vision_peft.engine.merged import save_merged
from vision_peft.errors import UserError

METHODS = {"lora": LoRA(rank=2), "comp_lora": CompLoRA(rank=2), "dora": DoRA(rank=2), "svfit": SVFit(rank=2)}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    torch.manual_seed(0)
    network = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=3).eval()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return network


def adapted(method=None, targets="all") -> nn.Module:
    network = vit()
    train(attach(network, method or LoRA(rank=2), targets))
    return network


def train(adapters: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def read(path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("targets", ["qv", ["blocks.1.attn.*", "blocks.1.mlp.*"], "all"])
def test_a_fresh_network_loads_it_strictly_and_computes_the_same(method, targets, tmp_path):
    network = adapted(METHODS[method], targets)
    before = snapshot(network)
    path = save_merged(tmp_path / "merged.safetensors", network)
    assert same(before, snapshot(network)), "the network keeps its frozen weights"
    fresh = vit()
    plain = fresh(X)
    fresh.load_state_dict(read(path), strict=True)
    with torch.no_grad():
        assert (network(X) - plain).abs().max() > 1e-3
        torch.testing.assert_close(fresh(X), network(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_suffixes_and_a_network_that_is_merged_already(suffix, tmp_path):
    network = adapted()
    path = save_merged(tmp_path / "new" / f"plain{suffix}", network)
    merge(network)
    again = save_merged(tmp_path / f"merged{suffix}", network)
    assert same(read(path), read(again)) and path.stat().st_mode & 0o777 == 0o644


def test_the_active_mix_is_what_is_written(tmp_path):
    network = adapted()
    train(attach(network, LoRA(rank=1), "qv", name="other", seed=1))
    activate(network, {"default": 0.5, "other": 0.25})
    fresh = vit()
    fresh.load_state_dict(read(save_merged(tmp_path / "mix.safetensors", network)))
    torch.testing.assert_close(fresh(X), network(X), rtol=1e-5, atol=1e-5)


def test_types_and_buffers_are_kept(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).bfloat16().eval()
    attach(network, LoRA(rank=1), "0")
    state = read(save_merged(tmp_path / "half.safetensors", network))
    assert same(state, network.state_dict()) and state["0.weight"].dtype == torch.bfloat16


def test_a_layer_under_two_names_is_written_under_both(tmp_path):
    layer = nn.Linear(4, 4)
    network = nn.Sequential(layer, nn.ReLU(), layer)
    fresh = copy.deepcopy(network)
    train(attach(network, LoRA(rank=1), "0"))
    fresh.load_state_dict(read(save_merged(tmp_path / "shared.safetensors", network)))
    x = torch.randn(2, 4)
    torch.testing.assert_close(fresh(x), network(x))


def test_a_tensor_that_another_layer_reads_is_refused(tmp_path):
    network = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    network[1].weight = network[0].weight
    attach(network, LoRA(rank=1), "0")
    with pytest.raises(UserError, match=r"^0\.weight: its tensor is also 1\.weight"):
        save_merged(tmp_path / "tied.safetensors", network)


def test_a_method_that_cannot_be_merged_is_refused(tmp_path, monkeypatch):
    network = adapted(LoRA(rank=2))
    monkeypatch.setattr(LoRA, "merge", "impossible")
    with pytest.raises(UserError, match="method lora cannot be merged"):
        save_merged(tmp_path / "merged.safetensors", network)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "message"), [("merged.bin", "ends in .safetensors"), ("folder.pt", "is a folder")])
def test_paths_that_cannot_be_written(name, message, tmp_path):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(UserError, match=message):
        save_merged(tmp_path / name, adapted())


def test_a_plain_network_is_refused(tmp_path):
    with pytest.raises(UserError, match="no adapters are attached"):
        save_merged(tmp_path / "merged.pt", vit())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_interrupted_writing_leaves_the_previous_file_whole(suffix, tmp_path, monkeypatch):
    network = adapted()
    path = save_merged(tmp_path / f"merged{suffix}", network)
    before, frozen = path.read_bytes(), snapshot(network)

    def half(state, file, *rest) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_file", half)
    monkeypatch.setattr(module.torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_merged(path, network)
    assert path.read_bytes() == before and same(frozen, snapshot(network))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "no stage is left behind"


def test_a_merge_that_fails_leaves_the_network_and_the_file(tmp_path, monkeypatch):
    network = adapted()
    path = save_merged(tmp_path / "merged.safetensors", network)
    before, frozen, outputs = path.read_bytes(), snapshot(network), network(X)
    last = network.__dict__["_vision_peft_installation"].sets["default"].adapters["blocks/1/mlp/fc2"]
    with monkeypatch.context() as patch:
        patch.setattr(last, "weight", lambda W: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_merged(path, network)
    assert path.read_bytes() == before and same(frozen, snapshot(network)) and torch.equal(network(X), outputs)
