"""The diffusion backbone on small pipelines: same outputs as diffusers, names, prompts, files that are not what they should be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from generators import classes, stable_diffusion, unconditional
from safetensors.torch import save_file

from vision_peft.backbones import Diffusion
from vision_peft.backbones.diffusion_attention import ChosenAttnProcessor, choose_attention
from vision_peft.backbones.diffusion_sites import name_denoiser_sites
from vision_peft.engine.fingerprint import fingerprint
from vision_peft.errors import UserError
from vision_peft.generation.sampling import draw_noise, sample

MAKERS = {"unconditional": unconditional, "stable_diffusion": stable_diffusion, "classes": classes}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name) / "pipeline") for name, make in MAKERS.items()}


def loaded(folder, **options) -> Diffusion:
    backbone = Diffusion(str(folder), **options)
    backbone.load()
    return backbone.eval()


@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_is_read_before_load_and_the_network_is_the_pipelines(folders, kind):
    backbone = Diffusion(str(folders[kind]))
    assert all(parameter.is_meta for parameter in backbone.network.parameters())
    names = [site.name for site in backbone.sites()]
    backbone.load()
    assert [site.name for site in backbone.sites()] == names
    pipeline = {"unconditional": DDIMPipeline, "stable_diffusion": StableDiffusionPipeline, "classes": DiTPipeline}[kind].from_pretrained(
        folders[kind]
    )
    denoiser = pipeline.transformer if kind == "classes" else pipeline.unet
    assert fingerprint(denoiser) == fingerprint(backbone.network)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone(*backbone.example()).shape == (2, backbone.channels, *backbone.sample_size)


def test_sampling_is_diffusers_own(folders):
    backbone = loaded(folders["unconditional"])
    pipeline = DDIMPipeline.from_pretrained(folders["unconditional"])
    noise = draw_noise(backbone, 2, 0)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(5)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(sample(backbone, noise, steps=5), x)


def test_text_guidance_and_decoding_are_the_pipelines(folders):
    backbone = loaded(folders["stable_diffusion"])
    pipeline = StableDiffusionPipeline.from_pretrained(folders["stable_diffusion"], safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise, prompts = draw_noise(backbone, 2, 0), ["a cat", "dog"]
    expected = pipeline(prompts, latents=noise, num_inference_steps=4, guidance_scale=5.0, output_type="pt").images
    x = sample(backbone, noise, backbone.condition(prompts), 4, 5.0, backbone.condition(["", ""]))
    found = backbone.decode(x) / 2 + 0.5
    torch.testing.assert_close(found.clamp(0, 1), expected, rtol=1e-4, atol=1e-4)
    assert backbone.preprocess.size == 16


def test_encoding_is_undone_by_decoding_up_to_the_autoencoder(folders):
    backbone = loaded(folders["stable_diffusion"])
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = backbone.encode(images)
    expected = backbone.vae.decode(backbone.vae.encode(images).latent_dist.mode()).sample
    assert latents.shape == (2, 4, 8, 8)
    torch.testing.assert_close(backbone.decode(latents), expected)


def test_every_variational_autoencoder_is_drawn_from(folders):
    backbone = loaded(folders["stable_diffusion"])
    torch.manual_seed(0)
    backbone.vae = AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(16, 16),
        up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(16, 16), norm_num_groups=8,
    ).eval()  # fmt: skip
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        told = backbone.vae.encode(images).latent_dist
        draws = [torch.Generator().manual_seed(1) for _ in range(2)]
        torch.testing.assert_close(backbone.encode(images), told.mode() * backbone.vae.config.scaling_factor)
        torch.testing.assert_close(backbone.encode(images, draws[0]), told.sample(draws[1]) * backbone.vae.config.scaling_factor)


def test_prompts_by_kind(folders):
    assert loaded(folders["unconditional"]).condition(["", ""]) == {}
    with pytest.raises(UserError, match="takes no prompt, given 'a cat'"):
        loaded(folders["unconditional"]).condition(["", "a cat"])
    assert loaded(folders["classes"]).condition(["3", "7"])["class_labels"].tolist() == [3, 7]
    with pytest.raises(UserError, match="class numbers from 0 to 10, not 'cat'"):
        loaded(folders["classes"]).condition(["cat"])


def test_seeds_give_the_same_pictures_whatever_the_count(folders):
    backbone = loaded(folders["unconditional"], scheduler="DDPMScheduler")
    noise = draw_noise(backbone, 3, 5)
    assert torch.equal(noise[:2], draw_noise(backbone, 2, 5))
    assert torch.equal(sample(backbone, noise, steps=3, seed=1), sample(backbone, noise, steps=3, seed=1))
    assert not torch.equal(sample(backbone, noise, steps=3, seed=1), sample(backbone, noise, steps=3, seed=2))


def test_canonical_names():
    with torch.device("meta"):
        shapes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1, "sample_size": 8}
        joint = SD3Transformer2DModel(joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, **shapes)
        crossed = PixArtTransformer2DModel(caption_channels=16, cross_attention_dim=16, norm_num_groups=8, **shapes)
    names = {site.target for site in name_denoiser_sites(joint)}
    assert {"dit.0.attn.q", "dit.0.context.attn.v", "dit.0.attn.out", "dit.0.mlp.fc1", "dit.proj_out"} <= names
    names = {site.target for site in name_denoiser_sites(crossed)}
    assert {"dit.0.self.attn.q", "dit.0.cross.attn.k", "dit.0.mlp.fc2", "dit.scale_shift_table"} <= names
    assert not any(name.startswith(("transformer_blocks", "scale_shift")) for name in names)


def test_names_of_unets(folders):
    plain = {site.target for site in Diffusion(str(folders["unconditional"])).sites()}
    assert {"unet.down.1.attentions.0.attn.q", "unet.mid.resnets.0.conv1", "unet.up.1.resnets.0.conv_shortcut", "unet.conv_in"} <= plain
    text = {site.target for site in Diffusion(str(folders["stable_diffusion"])).sites()}
    assert {"unet.down.0.attentions.0.0.cross.attn.k", "unet.up.1.attentions.1.0.mlp.fc1", "unet.mid.attentions.0.0.self.attn.out"} <= text


# ---- one file ----


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("layout", ["diffusers", "authors"])
def test_one_file_in_either_layout(folders, tmp_path, layout, suffix):
    whole = loaded(folders["stable_diffusion"])
    tensors = {key: tensor + 0.5 for key, tensor in whole.network.state_dict().items()}  # not the folder's own
    if layout == "authors":
        tensors = {authors_name(key): tensor for key, tensor in tensors.items()}
    path = tmp_path / f"denoiser{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save({"state_dict": tensors}, path)
    found = loaded(path, config=str(folders["stable_diffusion"]))
    assert found.network.state_dict().keys() == whole.network.state_dict().keys()
    for key, tensor in found.network.state_dict().items():
        torch.testing.assert_close(tensor, whole.network.state_dict()[key] + 0.5, rtol=0, atol=0)
    torch.testing.assert_close(found.condition(["a cat"]), whole.condition(["a cat"]))


def authors_name(key: str) -> str:
    """Of a UNet of two levels with one layer each, attention in the outer one, as CompVis's latent-diffusion spells it."""
    inner = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }  # fmt: skip
    head = {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0", "conv_out": "out.2",
        "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0",
        "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0", "up_blocks.1.attentions.1": "output_blocks.3.1",
    }  # fmt: skip
    place = next(name for name in sorted(head, key=len, reverse=True) if key.startswith(f"{name}."))
    rest = key.removeprefix(f"{place}.")
    if "resnets" in place:
        name, _, parameter = rest.rpartition(".")
        rest = f"{inner[name]}.{parameter}"
    return f"model.diffusion_model.{head[place]}.{rest}"


def test_one_file_that_cannot_be(folders, tmp_path):
    config = str(folders["stable_diffusion"])
    with pytest.raises(UserError, match="does not tell its shape"):
        (tmp_path / "empty.safetensors").touch()
        Diffusion(str(tmp_path / "empty.safetensors"))
    for path, content in ((tmp_path / "broken.safetensors", b"not one"), (tmp_path / "broken.ckpt", b"not one")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path.name}: cannot be loaded"):
            loaded(path, config=config)
    save_file({"some.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: cannot be loaded"):
        loaded(tmp_path / "other.safetensors", config=config)
    with pytest.raises(UserError, match="is a denoiser alone; one file needs the pipeline around it"):
        Diffusion(str(tmp_path / "other.safetensors"), config=str(folders["stable_diffusion"] / "unet"))


# ---- folders that are not what they should be ----


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: shutil.rmtree(folder / "unet"), "a pipeline without unet/ and transformer/"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json: not a JSON file"),
        (lambda folder: (folder / "model_index.json").unlink(), "holds neither model_index.json"),
        (lambda folder: _config(folder, _class_name="UNet9D"), "_class_name is 'UNet9D'"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), "holds no scheduler/; name one"),
    ],
)
def test_a_folder_that_is_no_generator(folders, tmp_path, spoil, message):
    shutil.copytree(folders["unconditional"], tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    with pytest.raises(UserError, match=message):
        Diffusion(str(tmp_path / "spoilt"))


def test_weights_that_are_missing_or_of_another_shape(folders, tmp_path):
    shutil.copytree(folders["unconditional"], tmp_path / "other")
    _config(tmp_path / "other", block_out_channels=[16, 64])
    with pytest.raises(UserError, match="cannot be loaded"):
        loaded(tmp_path / "other")
    (tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        loaded(tmp_path / "other")


def test_a_denoiser_alone_and_names_that_are_not_there(folders, tmp_path):
    alone = loaded(folders["unconditional"] / "unet", scheduler="DDIMScheduler")
    assert isinstance(alone.scheduler, DDIMScheduler)
    assert alone(*alone.example()).shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="no such folder, and not a hub name"):
        Diffusion(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="does not exist"):
        Diffusion(str(tmp_path / "nothing.safetensors"))
    with pytest.raises(UserError, match="unknown scheduler 'DDIMSchedular'; did you mean DDIMScheduler"):
        Diffusion(str(folders["unconditional"]), scheduler="DDIMSchedular")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_attention_computes_what_diffusers_does(folders, kind, precision):
    backbone = loaded(folders[kind])
    x, t, condition = backbone.example()
    layers = [module for module in backbone.network.modules() if isinstance(module, Attention)]
    assert layers and all(type(layer.processor) is ChosenAttnProcessor for layer in layers)

    def outcome() -> list[torch.Tensor]:
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            output = backbone(given, t, condition)
        return [output, *torch.autograd.grad(output.float().square().sum(), given)]

    ours = outcome()
    for layer in layers:
        layer.set_processor(AttnProcessor2_0())
    for found, expected in zip(ours, outcome()):
        tolerance = 1e-5 if precision == torch.float32 else 5e-2  # both round at every layer
        assert (found - expected).norm() <= tolerance * expected.norm()


def test_masked_attention_computes_what_diffusers_does():
    """Of prompts of several lengths, as PixArt's."""
    torch.manual_seed(0)
    layer = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8)
    x, context = torch.randn(3, 5, 16), torch.randn(3, 7, 12)
    mask = torch.where(torch.arange(7) < torch.tensor([[7], [4], [1]]), 0.0, -10000.0)[:, None]
    expected = layer(x, encoder_hidden_states=context, attention_mask=mask)
    choose_attention(layer)
    assert type(layer.processor) is ChosenAttnProcessor
    torch.testing.assert_close(layer(x, encoder_hidden_states=context, attention_mask=mask), expected)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache that holds whatever folder is put into it, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def put(folder, name: str):
        place, revision = tmp_path / f"models--{name.replace('/', '--')}", "0" * 40
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(revision)
        return shutil.copytree(folder, place / "snapshots" / revision)

    return put


@pytest.mark.parametrize("kind", MAKERS)
def test_a_hub_name_is_a_folder_of_the_hubs_cache(folders, kind, hub):
    hub(folders[kind], "owner/model")
    backbone, local = loaded("owner/model"), loaded(folders[kind])
    example = local.example()
    torch.testing.assert_close(backbone(*backbone.example()), local(*example), atol=0, rtol=0)
    assert backbone.pipeline is not None
    with pytest.raises(UserError, match="other/model: no such folder here, and the hub does not give it"):
        Diffusion("other/model")


def test_a_denoiser_may_lie_beside_the_index(folders, hub):
    """The layout of the first unconditional models on the hub: no unet/, no scheduler/."""
    folder = hub(folders["unconditional"], "owner/flat")
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        (folder / part).rmdir()
    flat, local = loaded("owner/flat"), loaded(folders["unconditional"])
    example = local.example()
    torch.testing.assert_close(flat(*example), local(*example), atol=0, rtol=0)
    assert flat.scheduler.config == local.scheduler.config
    assert flat.pipeline.unet is flat.network


def _config(folder, **changes) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
