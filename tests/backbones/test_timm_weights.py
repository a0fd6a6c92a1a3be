"""Weights files for timm backbones: strict by name and shape, resampled and cut where asked, never unpickled."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from vision_peft.backbones.vit import Vit
from vision_peft.errors import UserError


@pytest.fixture(scope="module")
def checkpoint():
    """A whole ViT-Tiny with classifier at 64 pixels: 1 + 16 positions."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=64).state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_file_fills_the_network(checkpoint, tmp_path, suffix):
    path = tmp_path / f"vit{suffix}"
    save_file(checkpoint, path) if suffix == ".safetensors" else torch.save(checkpoint, path)
    backbone = Vit("vit_tiny_patch16_224", image_size=64, weights=str(path))
    backbone.load()
    own = backbone.network.state_dict()
    assert checkpoint.keys() - own.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(own[key], checkpoint[key]) for key in own)


def test_position_table_is_resampled_and_blocks_are_cut(checkpoint, tmp_path):
    save_file(checkpoint, tmp_path / "vit.safetensors")
    backbone = Vit("vit_tiny_patch16_224", image_size=96, depth=2, weights=str(tmp_path / "vit.safetensors"))
    backbone.load()
    own = backbone.network.state_dict()
    assert backbone.resized == {"pos_embed"}
    expected = timm.layers.resample_abs_pos_embed(checkpoint["pos_embed"], [6, 6], num_prefix_tokens=1)
    assert torch.equal(own["pos_embed"], expected)
    assert torch.equal(own["blocks.1.attn.qkv.weight"], checkpoint["blocks.1.attn.qkv.weight"])
    assert backbone.num_blocks == 2 and torch.equal(own["norm.weight"], torch.ones(192))


def test_a_file_that_does_not_fit_is_refused_by_key(checkpoint, tmp_path):
    wrong = {**checkpoint, "blocks.0.extra": torch.zeros(1), "norm.bias": torch.zeros(3)}
    del wrong["blocks.5.norm1.weight"]
    save_file(wrong, tmp_path / "wrong.safetensors")
    backbone = Vit("vit_tiny_patch16_224", image_size=64, weights=str(tmp_path / "wrong.safetensors"))
    with pytest.raises(UserError, match=r"missing blocks\.5\.norm1\.weight.*blocks\.0\.extra.*norm\.bias \(3,\) instead of \(192,\)"):
        backbone.load()


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"weights": pytest.approx}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read"):
        Vit("resnet18", weights=str(tmp_path / "evil.pt")).load()


def test_without_a_network_the_download_names_the_alternatives(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)  # the hub's own switch: fail at once instead of after its retries
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"weights: PATH.*offline:effnet_lite0") as caught:
        Vit("vit_tiny_patch16_224.augreg_in21k").load()
    assert "\n" not in str(caught.value)
