"""CLIP against open_clip: both towers, files, sizes, chunks, cuts, caches and copies."""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from tiny_clip import (
    KINDS,
    PROMPTS,
    RESNET,
    TEXT,
    TIMM,
    TINY,
    VISION,
    images,
    loaded,
    make,
    original,
)
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.backbones import clip, clip_config
from vision_peft.backbones.clip import Clip
from vision_peft.backbones.clip_network import OPENAI_FACTS
from vision_peft.engine.install import attach
from vision_peft.errors import UserError


@pytest.mark.parametrize("kind", KINDS)
def test_both_towers_compute_what_open_clip_computes(kind, tmp_path):
    backbone = loaded(tmp_path, KINDS[kind]).eval()
    reference = original(backbone, KINDS[kind])
    tokens = open_clip.SimpleTokenizer(context_length=KINDS[kind]["text_cfg"]["context_length"])(PROMPTS)
    features = backbone(images())
    assert features.shape == (2, backbone.num_features) == (2, 32)
    torch.testing.assert_close(features, reference.encode_image(images(), normalize=False))
    torch.testing.assert_close(backbone.encode_text(tokens), reference.encode_text(tokens, normalize=False))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16"])
def test_adapted_attention_is_open_clips_at_full_size(name):
    """With adapters that change nothing yet: to 1e-5 in float32, and in bf16 no farther from float32 than open_clip itself is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        backbone = Clip(name)
        backbone.load()
    reference = original(backbone.eval(), open_clip.get_model_config(name))
    pictures, tokens = images(224), open_clip.get_tokenizer(name)(PROMPTS)
    attach(backbone.network, LoRA(rank=2), "attn", sites=backbone.sites())
    with torch.no_grad():
        pairs = [(backbone(pictures), reference.encode_image(pictures))]
        pairs += [(backbone.encode_text(backbone.tokenize(PROMPTS)), reference.encode_text(tokens))]
        with torch.autocast("cpu", torch.bfloat16):
            rough = [(backbone(pictures), reference.encode_image(pictures))]
            rough += [(backbone.encode_text(backbone.tokenize(PROMPTS)), reference.encode_text(tokens))]
    for (ours, theirs), (ours_rough, theirs_rough) in zip(pairs, rough):
        exact = F.normalize(theirs, dim=-1)
        torch.testing.assert_close(F.normalize(ours, dim=-1), exact, rtol=0, atol=1e-5)
        errors = [(F.normalize(each.float(), dim=-1) - exact).norm() for each in (ours_rough, theirs_rough)]
        assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize(("kind", "length"), {"flat": 12, "eos": 12, "bias": 12, "bidirectional": 77, "coca": 76}.items())
def test_text_runs_to_the_longest_prompt_where_that_changes_nothing(kind, length, tmp_path):
    backbone = loaded(tmp_path, KINDS[kind])
    whole = open_clip.SimpleTokenizer(context_length=KINDS[kind]["text_cfg"]["context_length"])(PROMPTS)
    tokens = backbone.tokenize(PROMPTS)
    assert tokens.shape == (3, length)
    assert torch.equal(tokens, whole[:, :length])
    torch.testing.assert_close(backbone.encode_text(tokens), backbone.encode_text(whole), rtol=1e-6, atol=1e-6)


def test_quick_gelu_follows_the_pretrained_tag():
    def acts(backbone: Clip) -> set[type]:
        return {type(module.gelu) for module in backbone.network.modules() if hasattr(module, "gelu")}

    assert acts(Clip("ViT-B-16", weights="openai")) == {QuickGELU}
    assert acts(Clip("ViT-B/16", weights="openai")) == {QuickGELU}
    assert acts(Clip("ViT-B-16", weights="laion2b_s34b_b88k")) == {nn.GELU}
    assert acts(Clip("ViT-B-16")) == {nn.GELU}
    assert acts(Clip("ViT-B-16-quickgelu")) == {QuickGELU}
    assert acts(Clip("ViT-B-16", weights="openai", quick_gelu=False)) == {nn.GELU}
    assert acts(Clip("ViT-B-16", quick_gelu=True)) == {QuickGELU}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_loads_a_file_in_open_clips_layout(suffix, tmp_path):
    source = loaded(tmp_path)
    values = {key: value.clone() for key, value in source.network.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    save_file(values, path) if suffix == ".safetensors" else torch.save(values, path)
    backbone = make(tmp_path, weights=str(path))
    assert backbone.network.logit_scale.is_meta
    backbone.load()
    network = backbone.network
    backbone.load()
    assert backbone.network is network
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert network.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[key]) for key, value in network.state_dict().items())


def test_loads_openais_own_archives(tmp_path):
    """A traced program with three numbers beside the weights, in half precision, whose QuickGELU no state dict tells."""
    source = loaded(tmp_path, quick_gelu=True).eval()
    network = original(source, {**TINY, "quick_gelu": True})
    network.attn_mask = network._buffers.pop("attn_mask")  # no tensor of theirs
    for number, key in enumerate(OPENAI_FACTS):
        network.__dict__.pop(key, None)
        network.register_buffer(key, torch.tensor(number))
    tokens = open_clip.SimpleTokenizer()(PROMPTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network, (images()[:1], tokens), check_trace=False).half().save(tmp_path / "ViT.pt")
    backbone = make(tmp_path, weights=str(tmp_path / "ViT.pt"))
    backbone.load()
    assert backbone.describe()["quick_gelu"] is True and backbone.network.logit_scale.dtype == torch.float32
    torch.testing.assert_close(backbone.eval()(images()), source(images()), rtol=2e-2, atol=2e-2)  # the weights were rounded
    torch.testing.assert_close(backbone.encode_text(tokens), source.encode_text(tokens), rtol=2e-2, atol=2e-2)


def test_files_that_do_not_load_are_the_users_error(tmp_path):
    values = loaded(tmp_path).network.state_dict()
    good, cut, foreign, text = (tmp_path / name for name in ("good.pt", "cut.pt", "foreign.pt", "text.safetensors"))
    torch.save(values, good)
    cut.write_bytes(good.read_bytes()[:20_000])
    torch.save({key: value for key, value in values.items() if key != "visual.proj"}, foreign)
    text.write_text("not weights")
    for path, reason in {cut: "", foreign: "visual.proj", text: ""}.items():
        with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{reason}") as error:
            make(tmp_path, weights=str(path)).load()
        assert "\n" not in str(error.value)


def test_a_failed_download_names_model_and_tag(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(UserError, match=r"ViT-B-16 openai .*Name or service not known"):
        Clip("ViT-B-16", weights="openai").load()


def test_mistakes_are_answered_before_anything_is_read(tmp_path):
    cases = {
        "did you mean ViT-B-16": dict(name="ViT-B16"),
        "did you mean openai.*laion2b_s34b_b88k": dict(weights="opanai"),
        "neither a file nor a pretrained tag": dict(weights=str(tmp_path / "absent.pt")),
        "multiple of ViT-B-16's patch size 16": dict(image_size=225),
        "attention pool": dict(name="RN50", weights="openai", image_size=288),
        "text_chunk": dict(text_chunk=0),
        "absent.json": dict(config=str(tmp_path / "absent.json")),
    }
    for message, options in cases.items():
        with pytest.raises(UserError, match=message) as error:
            Clip(**options)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"tiny\.json: no text_cfg"):
        make(tmp_path, {"embed_dim": 32, "vision_cfg": VISION})
    with pytest.raises(UserError, match="widht"):
        make(tmp_path, {**TINY, "text_cfg": {**TEXT, "widht": 48}})


def test_random_values_are_announced(tmp_path):
    with pytest.warns(UserWarning, match="random"):
        make(tmp_path).load()


def test_image_size_resizes_the_position_table(tmp_path):
    source = loaded(tmp_path)
    path = tmp_path / "weights.pt"
    torch.save(source.network.state_dict(), path)
    backbone = make(tmp_path, weights=str(path), image_size=48)
    backbone.load()
    assert backbone.preprocess.size == 48
    assert backbone.resized == {"visual.positional_embedding"}
    assert backbone.network.visual.positional_embedding.shape == (37, 64)
    assert backbone(images(48)).shape == (2, 32)


def test_image_size_of_a_timm_tower(tmp_path):
    backbone = loaded(tmp_path, {**TINY, "vision_cfg": TIMM}, image_size=64)
    assert backbone.network.visual.trunk.pos_embed.shape == (1, 17, 192)
    assert backbone.resized == {"visual.trunk.pos_embed"}
    assert backbone(images(64)).shape == (2, 32)


def test_preprocess_is_the_tags():
    siglip = Clip("ViT-B-16-SigLIP", weights="webli").preprocess
    assert (siglip.size, siglip.mean, siglip.interpolation) == (224, (0.5, 0.5, 0.5), "bicubic")
    assert Clip("ViT-L-14-336", weights="openai").preprocess.size == 336


def test_a_hub_repository_brings_config_and_weights(tmp_path, monkeypatch):
    source = loaded(tmp_path)
    torch.save(source.network.state_dict(), tmp_path / "weights.pt")
    content = {"model_cfg": TINY, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    monkeypatch.setattr(clip_config, "download_pretrained_from_hf", lambda repository, filename="weights.pt": str(tmp_path / filename))
    backbone = Clip("hf-hub:owner/tiny")
    backbone.load()
    assert backbone.preprocess.mean == (0.1, 0.2, 0.3)
    torch.testing.assert_close(backbone(images()), source(images()))


def test_a_folder_brings_config_and_weights(tmp_path):
    source = loaded(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match=r"model config .*folder.open_clip_config\.json"):
        Clip(f"local-dir:{folder}")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    backbone = Clip(f"local-dir:{folder}")
    with pytest.raises(UserError, match=r"folder holds no open_clip_model\.safetensors"):
        backbone.load()
    save_file(source.network.state_dict(), folder / "open_clip_model.safetensors")
    backbone.load()
    torch.testing.assert_close(backbone(images()), source(images()))
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    torch.testing.assert_close(backbone(images()), theirs.encode_image(images()))


@pytest.mark.parametrize("options", [dict(text_chunk=2), dict(text_checkpointing=True), dict(text_checkpointing=True, text_chunk=1)])
def test_chunks_and_checkpointing_change_neither_features_nor_gradients(options, tmp_path):
    def run(backbone):
        parameters = [backbone.network.transformer.resblocks[0].attn.in_proj_weight, backbone.network.text_projection]
        for parameter in parameters:
            parameter.requires_grad_(True)
        features = backbone.text_features(PROMPTS, frozen=False)
        return features, *torch.autograd.grad((features * features.detach().sin()).sum(), parameters)

    for plain, other in zip(run(loaded(tmp_path)), run(loaded(tmp_path, **options))):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "coca"])
def test_the_vision_tower_can_be_cut_at_every_block(kind, tmp_path):
    backbone = loaded(tmp_path, KINDS[kind])
    whole = backbone(images())
    assert backbone.num_blocks == 3
    for block in range(4):
        torch.testing.assert_close(backbone.suffix(backbone.prefix(images(), block), block), whole)


def test_first_block_of_targets(tmp_path):
    backbone = make(tmp_path)
    assert backbone.first_block({"vision.2.attn.q", "vision.1.mlp.fc1", "text.0.attn.q"}) == 1
    assert backbone.first_block({"text.0.attn.q", "vision.proj", "vision.norm"}) == 3
    assert backbone.first_block(set()) == 3
    for early in ("vision.patch_embed", "vision.class_embedding", "vision.pos_embed", "vision.norm_pre"):
        assert backbone.first_block({early, "vision.2.attn.q"}) == 0


def test_other_vision_towers_run_but_cannot_be_cut(tmp_path):
    for config, size in ((RESNET, 64), ({**TINY, "vision_cfg": TIMM}, 224)):
        backbone = loaded(tmp_path, config)
        assert backbone(images(size)).shape == (2, 32)
        assert (backbone.num_blocks, backbone.first_block({"vision.2.attn.q"})) == (0, 0)
        with pytest.raises(TypeError, match="no blocks"):
            backbone.prefix(images(size), 0)


def test_batch_norm_stays_frozen(tmp_path):
    backbone = loaded(tmp_path, RESNET).train()
    before = copy.deepcopy(backbone.network.state_dict())
    backbone(images(64))
    assert all(torch.equal(value, before[key]) for key, value in backbone.network.state_dict().items())


def test_text_features_are_remembered_only_while_frozen(tmp_path):
    backbone = loaded(tmp_path).train()
    weight = backbone.network.ln_final.weight
    with torch.inference_mode():  # e.g. a sanity check before the training
        first = backbone.text_features(PROMPTS, frozen=True)
    assert not first.is_inference() and not first.requires_grad
    assert backbone.training and backbone.network.training
    assert backbone.text_features(list(PROMPTS), frozen=True) is first
    assert not torch.allclose(backbone.text_features(PROMPTS[::-1], frozen=True), first)
    with torch.no_grad():
        weight.mul_(2)
    weight.requires_grad_(True)
    fresh = backbone.text_features(PROMPTS, frozen=False)
    assert fresh.requires_grad and not torch.allclose(fresh, first)
    torch.testing.assert_close(backbone.text_features(PROMPTS, frozen=True), fresh.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert backbone.text_features(PROMPTS[:1], frozen=True).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind, tmp_path):
    backbone = loaded(tmp_path, KINDS[kind])
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        torch.testing.assert_close(other(images()), backbone(images()))
        torch.testing.assert_close(other.text_features(PROMPTS, frozen=True), backbone.text_features(PROMPTS, frozen=True))
        assert other.sites() == backbone.sites()
        assert other.describe() == backbone.describe()


def test_a_hugging_face_text_tower_runs_to_the_longest_prompt(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    sizes = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=60, max_position_embeddings=20
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "pad_token_id": 0, **sizes}))
    text = {"hf_model_name": str(tmp_path), "hf_tokenizer_name": "absent", "hf_proj_type": "linear", "context_length": 12}
    backbone = loaded(tmp_path, {**TINY, "text_cfg": text})
    assert {site.path for site in backbone.sites()} == {name for name, _ in backbone.network.named_parameters()}
    monkeypatch.setattr(clip, "tokenizer", lambda text_cfg: lambda prompts: torch.tensor([[2, 5, 6, 3] + [0] * 8] * len(prompts)))
    assert backbone.tokenize(PROMPTS).shape == (3, 4)
    full = clip.tokenizer({})(PROMPTS)
    torch.testing.assert_close(backbone.eval().encode_text(full), backbone.encode_text(full[:, :4]))
    assert {"text.token_embed", "text.0.attn.q", "text.0.mlp.fc2"} <= {site.target for site in backbone.sites()}
    features = backbone.train().text_features(PROMPTS, frozen=True)
    assert features.shape == (3, 32)
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=1e-6)  # BERT's dropout was off
