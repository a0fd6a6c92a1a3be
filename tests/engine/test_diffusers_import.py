"""What LoRA files of diffusers and kohya say exactly: every layer kind, every spelling, every scale; and what is refused in one line."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vision_peft.adapters.lora import LoRA
from vision_peft.backbones.diffusion_sites import name_denoiser_sites
from vision_peft.engine.diffusers_import import METADATA, load_diffusers
from vision_peft.engine.diffusers_layout import WEIGHTS, save_diffusers
from vision_peft.engine.install import attach, installed
from vision_peft.errors import UserError

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # 32 x 32
CONV = "down_blocks.1.resnets.0.conv1"  # 64 x 32 x 3 x 3
NARROW = "conv_out"  # 4 x 32 x 3 x 3


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8,
    ).eval()  # fmt: skip


@torch.no_grad()
def run(network: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    x, text, pooled = (torch.randn(shape, generator=draw) for shape in ((2, 4, 8, 8), (2, 5, 32), (2, 16)))
    t = torch.tensor([10, 700])
    return network(x, text, pooled, t).sample if isinstance(network, SD3Transformer2DModel) else network(x, t, text).sample


def same(network: nn.Module, expected: Tensor) -> None:
    torch.testing.assert_close(run(network), expected, rtol=1e-5, atol=1e-5)


def factors(path: str, rank: int) -> tuple[Tensor, Tensor]:
    """lora_down in the kernel's own shape, lora_up 1 x 1, for a layer of the UNet."""
    draw = torch.Generator().manual_seed(len(path) + rank)
    out, *rest = unet().get_submodule(path).weight.shape
    return torch.randn(rank, *rest, generator=draw) * 0.2, torch.randn(out, rank, *(1 for _ in rest[1:]), generator=draw) * 0.2


def added(layers: dict[str, tuple[Tensor, Tensor, float]]) -> Tensor:
    """What a UNet gives with scale * up down added to its weights."""
    network = unet()
    for path, (down, up, scale) in layers.items():
        network.get_submodule(path).weight.data += scale * torch.einsum("or,r...->o...", up.flatten(1), down)
    return run(network)


def kohya(path: str, down: Tensor, up: Tensor, alpha: float | None = None) -> dict[str, Tensor]:
    flat = f"lora_unet_{path.replace('.', '_')}"
    tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
    return tensors if alpha is None else tensors | {f"{flat}.alpha": torch.tensor(alpha)}


def plain(path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}


def read(file, tensors: dict[str, Tensor], header: object = None, network: nn.Module | None = None) -> nn.Module:
    told = None if header is None else {METADATA: header if isinstance(header, str) else json.dumps(header)}
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, file, told)
    network = unet() if network is None else network
    load_diffusers(network, file, name_denoiser_sites(network))
    return network


@pytest.fixture
def file(tmp_path):
    return tmp_path / "lora.safetensors"


def layers_of(network: nn.Module) -> list[str]:
    return [site.name for site in name_denoiser_sites(network) if site.role == "weight" and site.kind in ("linear", "conv")]


# ---- scales and layers ----


def test_a_kohya_file_with_ranks_of_their_own(file):
    """Linear and 3 x 3 layers, ranks 2 and 5; alpha of the first 6 (scale 3), none for the second (scale 1)."""
    query, conv = factors(QUERY, 2), factors(CONV, 5)
    network = read(file, kohya(QUERY, *query, alpha=6.0) | kohya(CONV, *conv))
    expected = added({QUERY: (*query, 3.0), CONV: (*conv, 1.0)})
    same(network, expected)
    assert not torch.allclose(expected, run(unet()), atol=0.05)


def test_a_kohya_file_in_the_names_of_the_models_authors(file):
    query, conv = factors(QUERY, 2), factors(CONV, 2)
    theirs = kohya("input_blocks.1.1.transformer_blocks.0.attn1.to_q", *query, alpha=6.0) | kohya("input_blocks.3.0.in_layers.2", *conv)
    same(read(file, theirs), added({QUERY: (*query, 3.0), CONV: (*conv, 1.0)}))


def test_a_matrix_and_a_1x1_kernel_are_the_same(file):
    down, up = factors(QUERY, 2)
    same(read(file, kohya(QUERY, down[:, :, None, None], up[:, :, None, None])), added({QUERY: (down, up, 1.0)}))
    path = "mid_block.attentions.0.proj_in"  # Conv2d 1 x 1
    down, up = factors(path, 2)
    same(read(file, plain(path, down[:, :, 0, 0], up[:, :, 0, 0])), added({path: (down, up, 1.0)}))


@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize(
    "header, scale",
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 1, "alpha_pattern": {"attn1.to_q": 12}}, 3.0),
        ({"r": 4, "alpha_pattern": {"to_q": 12, "attn1.to_q": 8}}, 3.0),  # of two patterns that match, PEFT takes the first
        ({}, 1.0),
    ],
)
def test_scales_in_the_header(file, prefix, header, scale):
    down, up = factors(QUERY, 4)
    told = {f"{prefix}{key}": value for key, value in header.items()} | {"text_encoder.lora_alpha": 100}
    same(read(file, plain(f"{prefix}{QUERY}", down, up), told), added({QUERY: (down, up, scale)}))


def test_half_precision_and_alpha_of_shape_1(file):
    down, up = (part.to(torch.bfloat16) for part in factors(QUERY, 2))
    tensors = kohya(QUERY, down, up) | {f"lora_unet_{QUERY.replace('.', '_')}.alpha": torch.tensor([1.0], dtype=torch.float16)}
    same(read(file, tensors), added({QUERY: (down.float(), up.float(), 0.5)}))


def test_every_layer_of_a_transformer_in_both_directions(tmp_path):
    network = sd3()
    adapters = attach(network, LoRA(rank=3, alpha=7.0), layers_of(network), sites=name_denoiser_sites(network))
    for parameter in adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_diffusers(tmp_path / "ours", network)
    theirs = sd3()
    theirs.load_lora_adapter(str(tmp_path / "ours"), prefix="transformer", weight_name=WEIGHTS)
    same(theirs.eval(), run(network))
    theirs = sd3()
    theirs.add_adapter(LoraConfig(r=3, lora_alpha=12, target_modules=["to_q", "add_k_proj", "net.2", "proj_out"]))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_lora_adapter(tmp_path / "theirs")
    own = sd3()
    load_diffusers(own, tmp_path / "theirs", name_denoiser_sites(own))
    same(own, run(theirs))
    assert not torch.allclose(run(own), run(sd3()), atol=0.05)


def test_ranks_that_differ_survive_diffusers(tmp_path, file):
    """Where ranks differ and there is no alpha, diffusers before 0.40 scales layers by alpha of another rank."""
    query, conv = factors(QUERY, 2), factors(CONV, 5)
    network = read(file, plain(QUERY, *query) | plain(CONV, *conv))
    save_diffusers(tmp_path / "ours", network)
    kept = load_file(tmp_path / "ours" / WEIGHTS)
    small = {key: value[:2] if "lora_A" in key else value[:, :2] for key, value in kept.items() if QUERY in key}  # the rest is padding
    save_file({key: value.contiguous() for key, value in (kept | small).items()}, tmp_path / "ours" / WEIGHTS)
    theirs = unet()
    theirs.load_lora_adapter(str(tmp_path / "ours"), prefix="unet", weight_name=WEIGHTS)
    same(theirs.eval(), run(network))


@pytest.mark.parametrize("key", ["lora_te_x.alpha", "lora_te1_x.alpha", "lora_te2_x.alpha", "lora_te3_x.alpha", "text_encoder_2.x.alpha"])
def test_text_encoders_are_passed_over_aloud(file, key):
    down, up = factors(QUERY, 2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        network = read(file, plain(QUERY, down, up) | {key: torch.ones(())})
    assert [f"1 tensors of text encoders ({key}, ...) are passed over" in str(each.message) for each in told] == [True]
    same(network, added({QUERY: (down, up, 1.0)}))


# ---- refusals ----

A, B = torch.ones(2, 32), torch.ones(32, 2)
PAIR = plain(QUERY, A, B)


@pytest.mark.parametrize(
    "tensors, header, message",
    [
        (PAIR | plain(f"unet.{QUERY}", A, B), None, "'unet.*lora_A.weight' is the second lora_A of its layer"),
        (PAIR | kohya(QUERY, A, B), None, "lora_unet.*' is the second lora_A of its layer"),
        (PAIR | {"mid_block.resnets.0.conv1.alpha": torch.ones(())}, None, "conv1: lora_A .its down matrix. is missing"),
        (PAIR | {f"{QUERY}.alpha": torch.ones(2)}, None, "alpha is not one finite number"),
        (PAIR | {f"{QUERY}.alpha": torch.tensor(float("nan"))}, None, "alpha is not one finite number"),
        (PAIR | {f"{QUERY}.alpha": torch.ones(())}, {"lora_alpha": 4}, "tells alpha twice"),
        (plain(QUERY, A[0], B), None, r"matrices \(32,\) and \(32, 2\) do not fit its weight \(32, 32\)"),
        (plain(QUERY, A, torch.tensor(1.0)), None, r"matrices \(2, 32\) and \(\) do not fit"),
        (plain(QUERY, torch.tensor(1.0), B), None, r"matrices \(\) and \(32, 2\) do not fit"),
        (plain(QUERY, A[:0], B[:, :0]), None, r"matrices \(0, 32\) and \(32, 0\) do not fit"),
        (plain(CONV, torch.ones(2, 32, 1, 9), torch.ones(64, 2, 1, 1)), None, r"do not fit its weight \(64, 32, 3, 3\)"),
        (plain(CONV, torch.ones(2, 288, 1, 1), torch.ones(64, 2, 1, 1)), None, r"do not fit its weight \(64, 32, 3, 3\)"),
        (PAIR | plain(NARROW, torch.ones(8, 32, 3, 3), torch.ones(4, 8, 1, 1)), None, r"conv_out: .* has rank 4 at most, and .* rank is 8"),
        (plain("mid_block.resnets.0.norm1", torch.ones(1, 1), torch.ones(64, 1)), None, "has no layer 'mid_block.resnets.0.norm1'"),
        (kohya(QUERY.replace("to_q", "to_p"), A, B), None, "has no layer 'lora_unet_down.*to_p'.*did you mean .*attn1.to_q"),
        (PAIR | {f"{QUERY}.lora_mid.weight": A}, None, "lora_mid.weight' is none of a LoRA"),
        (PAIR | {f"{QUERY}.dora_scale": A}, None, "dora_scale' is none of a LoRA"),
        (PAIR, [1], "is no mapping"),
        (PAIR, {"lora_alpha": "x"}, "has an alpha that is no number"),
        (PAIR, {"alpha_pattern": 3}, "has an alpha that is no number"),
        (PAIR, {"alpha_pattern": {"to_q": None}}, "has an alpha that is no number"),
        (PAIR, {"alpha_pattern": {"to_(q": 3}}, r"'to_\(q' is no regular expression"),
        (PAIR, {"unet.use_dora": True}, "is a DoRA"),
        (PAIR, "{", "is no JSON"),
    ],
)
def test_refused_in_one_line_and_nothing_attached(file, tensors, header, message):
    network = unet()
    before = run(network)
    with pytest.raises(UserError, match=message) as caught:
        read(file, tensors, header, network)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert not installed(network) and torch.equal(run(network), before)


def test_names_that_two_modules_share_are_refused(file):
    """a.b_c and a_b.c are one name with underscores."""
    network = nn.ModuleDict({"a": nn.ModuleDict({"b_c": nn.Linear(4, 4)}), "a_b": nn.ModuleDict({"c": nn.Linear(4, 4)})})
    with pytest.raises(UserError, match=r"lora_unet_a_b_c may be a.b_c or a_b.c"):
        read(file, kohya("a.b_c", torch.ones(1, 4), torch.ones(4, 1)), None, network)


def test_a_pickle_is_never_opened(tmp_path):
    torch.save(PAIR, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_diffusers(unet(), tmp_path / "lora.safetensors", [])


def test_a_grouped_convolution_is_not_written(tmp_path):
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, groups=2)

        def forward(self, x):
            return self.conv(x)

        def load_lora_adapter(self):
            raise AssertionError

    network = Denoiser()
    sites = name_denoiser_sites(network)
    attach(network, LoRA(rank=2), [site.name for site in sites if site.role == "weight"], sites=sites)
    with pytest.raises(UserError, match=r"conv: .*grouped convolution"):
        save_diffusers(tmp_path / "a", network)
    assert not (tmp_path / "a").exists()
