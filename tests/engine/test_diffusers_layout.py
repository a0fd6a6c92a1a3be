"""LoRA files of diffusers and of kohya's scripts, in both directions, against diffusers itself."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from generators import stable_diffusion, unconditional
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.svfit import SVFit
from vision_peft.backbones import Diffusion
from vision_peft.cli import main
from vision_peft.engine.diffusers_import import load_diffusers
from vision_peft.engine.diffusers_layout import WEIGHTS, save_diffusers
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

TARGETS = ["to_q", "to_k", "to_out.0", "conv1", "ff.net.0.proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    stable_diffusion(folder / "text")
    unconditional(folder / "plain")
    return folder


@pytest.fixture
def backbone(place) -> Diffusion:
    found = Diffusion(str(place / "text"))
    found.load()
    return found.eval()


@torch.no_grad()
def run(network: UNet2DConditionModel) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 24, generator=draw)
    return network(x, torch.tensor([10, 700]), text).sample


def random_(module: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2


def theirs(place, rank: int = 4, alpha: int = 12) -> UNet2DConditionModel:
    """diffusers' own adapter, with a scale of 3."""
    network = UNet2DConditionModel.from_pretrained(place / "text" / "unet").eval()
    network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
    draw = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return network


# ---- ours, read by diffusers ----


@pytest.mark.parametrize("scaling", ["rank", "sqrt_rank"])
def test_what_is_written_is_what_diffusers_computes(place, backbone, tmp_path, scaling):
    bare = copy.deepcopy(backbone.network)
    plain = run(bare)
    method = LoRA(rank=3, alpha=7.0, scaling=scaling)
    random_(attach(backbone.network, method, ["attn", "unet.*.conv1", "unet.*.mlp.fc1"], sites=backbone.sites()))
    expected = run(backbone.network)
    save_diffusers(tmp_path / "lora", backbone.network)
    bare.load_lora_adapter(str(tmp_path / "lora"), prefix="unet", weight_name=WEIGHTS)
    torch.testing.assert_close(run(bare), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, plain, atol=0.05)
    pipeline = StableDiffusionPipeline.from_pretrained(place / "text", safety_checker=None)
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    torch.testing.assert_close(run(pipeline.unet), expected, rtol=1e-4, atol=1e-5)


def test_what_diffusers_has_no_place_for(place, backbone, tmp_path):
    attach(backbone.network, SVFit(rank=4), "attn", sites=backbone.sites())
    with pytest.raises(UserError, match="not a low-rank update"):
        save_diffusers(tmp_path / "a", backbone.network)
    other = Diffusion(str(place / "plain"))
    other.load()
    attach(other.network, LoRA(rank=2), "attn", sites=other.sites())
    with pytest.raises(UserError, match="loads no LoRA into a UNet2DModel"):
        save_diffusers(tmp_path / "a", other.network)
    assert not (tmp_path / "a").exists()


# ---- theirs, read here ----


def test_a_model_adapter_of_diffusers(place, backbone, tmp_path):
    network = theirs(place)
    network.save_lora_adapter(tmp_path)
    load_diffusers(backbone.network, tmp_path, backbone.sites())
    torch.testing.assert_close(run(backbone.network), run(network), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_a_pipelines_file_with_its_alpha_in_the_header(place, backbone, tmp_path, form):
    network = theirs(place)
    layers = get_peft_model_state_dict(network)
    layers = convert_state_dict_to_diffusers(layers) if form == "diffusers" else layers
    told = {"unet_lora_adapter_metadata": network.peft_config["default"].to_dict()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **told)
    load_diffusers(backbone.network, tmp_path / WEIGHTS, backbone.sites())
    torch.testing.assert_close(run(backbone.network), run(network), rtol=1e-4, atol=1e-5)


def kohya(network: UNet2DConditionModel, alpha: float) -> dict[str, torch.Tensor]:
    """What kohya's scripts call the tensors of an adapter that diffusers made."""
    found = {}
    for key, tensor in get_peft_model_state_dict(network).items():
        path, part = key.removesuffix(".weight").rsplit(".", 1)
        flat = f"lora_unet_{path.replace('.', '_')}"
        found[f"{flat}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor.contiguous()
        found[f"{flat}.alpha"] = torch.tensor(alpha)
    return found


def test_kohyas_file_with_parts_of_a_text_encoder(place, backbone, tmp_path):
    network = theirs(place)
    extra = {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.zeros(4, 24)}
    save_file(kohya(network, 12.0) | extra, tmp_path / "k.safetensors")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_diffusers(backbone.network, tmp_path / "k.safetensors", backbone.sites())
    assert any("1 tensors of text encoders" in str(each.message) for each in told)
    torch.testing.assert_close(run(backbone.network), run(network), rtol=1e-4, atol=1e-5)


def test_layers_of_different_ranks_and_the_oldest_names(place, backbone, tmp_path):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    draw = torch.Generator().manual_seed(6)
    A, B = torch.randn(2, 16, generator=draw), torch.randn(16, 2, generator=draw)
    C, D = torch.randn(5, 16, generator=draw), torch.randn(16, 5, generator=draw)
    names = {f"unet.{layer}.processor.to_q_lora.down.weight": A, f"unet.{layer}.processor.to_q_lora.up.weight": B}
    names |= {f"unet.{layer}.processor.to_out_lora.down.weight": C, f"unet.{layer}.processor.to_out_lora.up.weight": D}
    save_file(names, tmp_path / "old.safetensors")
    expected = copy.deepcopy(backbone.network)
    expected.get_submodule(f"{layer}.to_q").weight.data += B @ A
    expected.get_submodule(f"{layer}.to_out.0").weight.data += D @ C
    load_diffusers(backbone.network, tmp_path, backbone.sites())
    torch.testing.assert_close(run(backbone.network), run(expected), rtol=1e-4, atol=1e-5)


def _wider(tensors: dict) -> dict:
    return {key: value.repeat(1, 2) if "lora_down" in key and value.ndim == 2 else value for key, value in tensors.items()}


def _without_ups(tensors: dict) -> dict:
    return {key: value for key, value in tensors.items() if "lora_up" not in key}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: {key.replace("down_blocks_0", "down_blocks_9"): value for key, value in tensors.items()}, "another architecture"),
        (_wider, "do not fit"),
        (_without_ups, "lora_B .its up matrix. is missing"),
        (lambda tensors: tensors | {"something.else": torch.zeros(1)}, "'something.else' is none of a LoRA"),
        (lambda tensors: {"text_encoder.x.lora_A.weight": torch.zeros(1, 1)}, "holds no LoRA of a denoiser"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*text encoders")
def test_files_that_are_not_for_this_denoiser(place, backbone, tmp_path, change, message):
    save_file({key: value.contiguous() for key, value in change(kohya(theirs(place), 4.0)).items()}, tmp_path / "k.safetensors")
    before = run(backbone.network)
    with pytest.raises(UserError, match=message):
        load_diffusers(backbone.network, tmp_path / "k.safetensors", backbone.sites())
    assert torch.equal(run(backbone.network), before)


def test_files_that_are_none(place, backbone, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_diffusers(backbone.network, tmp_path / "x.safetensors", backbone.sites())
    with pytest.raises(UserError, match="does not exist"):
        load_diffusers(backbone.network, tmp_path / "y.safetensors", backbone.sites())
    with pytest.raises(UserError, match=r"holds 0 \.safetensors files"):
        load_diffusers(backbone.network, place, backbone.sites())


# ---- by command ----


def config(place) -> str:
    path = place / "config.yaml"
    backbone = {"class_path": "vision_peft.backbones.Diffusion", "init_args": {"name": str(place / "text")}}
    model = {"class_path": "DiffusionFineTuning", "init_args": {"backbone": backbone, "samples": 0}}
    data = {"class_path": "GeneratorImages", "init_args": {"images": str(place / "pictures"), "prompt": "a"}}
    path.write_text(json.dumps({"model": model, "data": data}))
    return str(path)


def test_import_and_export_by_command(place, tmp_path, capsys):
    from PIL import Image

    (place / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (16, 16)).save(place / "pictures" / "a.png")
    network = theirs(place)
    save_file(kohya(network, 12.0), tmp_path / "k.safetensors")
    assert main(["import", str(tmp_path / "k.safetensors"), "--config", config(place), "--output", str(tmp_path / "adapter")]) == 0
    for form in ("diffusers", "pipeline", "merged"):
        output = tmp_path / (form if form != "merged" else "m.safetensors")
        assert main(["export", str(tmp_path / "adapter"), "--to", form, "--output", str(output)]) == 0
    capsys.readouterr()
    torch.testing.assert_close(run(StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline").unet), run(network), rtol=1e-4, atol=1e-5)
    bare = UNet2DConditionModel.from_pretrained(place / "text" / "unet").eval()
    bare.load_state_dict(load_file(tmp_path / "m.safetensors"))
    torch.testing.assert_close(run(bare), run(network), rtol=1e-4, atol=1e-5)
    assert main(["export", str(tmp_path / "adapter"), "--to", "pipeline", "--output", str(tmp_path / "pipeline")]) == 2
    assert "exists already" in capsys.readouterr().err
