import copy
import json
import pickle
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch import nn

from vision_peft.backbones import clip
from vision_peft.backbones.clip import Clip
from vision_peft.errors import UserError

VISION = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 3}
TINY = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
PROMPTS = ["a photo of a cat.", "a photo of a three-toed sloth.", "a photo of a dog."]

# the text towers by how they pool; the last two need every column
CAUSAL_EOS = {**TINY, "custom_text": True, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407}}
CAUSAL_BIAS = {**TINY, "custom_text": True, "text_cfg": {**TEXT, "proj_bias": True}}
BIDIRECTIONAL = {**TINY, "custom_text": True, "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last"}}
COCA = {
    **TINY,
    "custom_text": True,
    "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5, "output_tokens": True},
    "text_cfg": {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2, "attn_pooler_heads": 4},
}
RESNET = {**TINY, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 224}
KINDS = {"flat": TINY, "eos": CAUSAL_EOS, "bias": CAUSAL_BIAS, "bidirectional": BIDIRECTIONAL, "coca": COCA}


def make(tmp_path: Path, config: dict = TINY, **options) -> Clip:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config))
    return Clip(config=str(path), **options)


def loaded(tmp_path: Path, config: dict = TINY, **options) -> Clip:
    torch.manual_seed(0)
    backbone = make(tmp_path, config, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone.load()
    _scramble(backbone.network)
    return backbone


def _scramble(network: nn.Module) -> None:
    """Give every tensor an influence (open_clip starts biases at 0 and leaves some tensors uninitialised)."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        with torch.no_grad():
            base = torch.ones_like(parameter) if parameter.ndim == 1 else 0
            parameter.copy_(base + 0.1 * torch.randn(parameter.shape, generator=generator))


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def original(backbone: Clip, config: dict) -> nn.Module:
    """open_clip's own network, of its own classes, with the same values."""
    config = copy.deepcopy(config)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    network = (open_clip.CoCa if "multimodal_cfg" in config else kind)(**config)
    network.load_state_dict(backbone.network.state_dict())
    return network.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_both_towers_compute_what_open_clip_computes(kind, tmp_path):
    backbone = loaded(tmp_path, KINDS[kind]).eval()
    reference = original(backbone, KINDS[kind])
    tokens = open_clip.SimpleTokenizer(context_length=KINDS[kind]["text_cfg"]["context_length"])(PROMPTS)
    features = backbone(images())
    assert features.shape == (2, backbone.num_features) == (2, 32)
    torch.testing.assert_close(features, reference.encode_image(images(), normalize=False))
    torch.testing.assert_close(backbone.encode_text(tokens), reference.encode_text(tokens, normalize=False))


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


@pytest.mark.parametrize("name", ["ViT-B-16", "RN50", "convnext_base", "ViT-B-16-SigLIP", "coca_ViT-B-32", "EVA01-g-14"])
def test_sites_cover_every_parameter_under_unique_names(name):
    backbone = Clip(name)
    sites = backbone.sites()
    parameters = dict(backbone.network.named_parameters())
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in parameters.values())
    assert len({site.name for site in sites}) == len(sites)
    assert {site.path for site in sites} == set(parameters)
    assert sum(torch.Size(site.shape).numel() for site in sites) == sum(parameter.numel() for parameter in parameters.values())
    towers = {"vision", "text", "text_decoder", "logit_scale", "logit_bias"}
    assert {site.target.split(".")[0] for site in sites} <= towers
    for site in sites:
        reader = backbone.network.get_submodule(site.reader)
        assert all(callable(getattr(reader, call)) for call in site.calls)


def test_canonical_names_of_vit_b_16():
    sites = {site.name: site for site in Clip("ViT-B-16").sites()}
    qkv = [site for site in sites.values() if re.fullmatch(r"(vision|text)\.\d+\.attn\.[qkv]", site.name)]
    assert len(qkv) == 72
    assert sum(2 * sum(site.matrix_shape) for site in qkv) == 184_320  # rank 2, the count of the CLIP-LoRA paper
    q, k, v = (sites[f"text.11.attn.{part}"] for part in "qkv")
    assert (q.rows, k.rows, v.rows) == ((0, 512), (512, 1024), (1024, 1536))
    assert {site.path for site in (q, k, v)} == {"transformer.resblocks.11.attn.in_proj_weight"}
    assert sites["vision.0.attn.out"].reader == "visual.transformer.resblocks.0.attn"
    layers = ["mlp.fc1", "mlp.fc2", "norm1", "norm2", "attn.out"]
    for tower in ("vision", "text"):
        targets = {site.target for site in sites.values()}
        assert {f"{tower}.{block}.{layer}" for block in range(12) for layer in layers} <= targets
    outside = ["patch_embed", "norm_pre", "norm", "class_embedding", "pos_embed", "proj"]
    text = ["text.token_embed", "text.pos_embed", "text.norm", "text.projection", "logit_scale"]
    assert {f"vision.{name}" for name in outside} | set(text) <= targets


def test_canonical_names_of_a_timm_tower():
    sites = {site.name: site for site in Clip("ViT-B-16-SigLIP").sites()}
    assert sites["vision.3.attn.k"].rows == (768, 1536)
    assert sites["vision.3.attn.k"].path == "visual.trunk.blocks.3.attn.qkv.weight"
    assert {"vision.3.attn.out", "vision.3.mlp.fc1", "vision.patch_embed", "text.3.attn.q", "text.projection", "logit_bias"} <= set(sites)


def test_the_attention_pool_is_the_reader_of_its_layers():
    sites = {site.path: site for site in Clip("RN50").sites()}
    assert sites["visual.attnpool.positional_embedding"].role == "other"
    site = sites["visual.attnpool.q_proj.weight"]  # AttentionPool2d never calls its four Linears
    assert (site.reader, site.parameter) == ("visual.attnpool", "q_proj.weight")


@contextmanager
def doubled_within_calls(network: nn.Module, site):
    """What the engine does with an owner's own tensor: another value, but only while a method named in `calls` runs."""
    owner = network.get_submodule(site.reader)
    holder = owner.get_submodule(site.parameter.rpartition(".")[0])
    name = site.parameter.rpartition(".")[2]

    def shadowing(call):
        own = getattr(owner, call)

        def run(*args, **kwargs):
            object.__setattr__(holder, name, 2 * holder._parameters[name].detach())
            try:
                return own(*args, **kwargs)
            finally:
                holder.__dict__.pop(name, None)

        return run

    try:
        for call in site.calls:
            object.__setattr__(owner, call, shadowing(call))
        yield
    finally:
        for call in site.calls:
            owner.__dict__.pop(call, None)


@contextmanager
def doubled(network: nn.Module, site):
    parameter = network.get_parameter(site.path)
    before = parameter.detach().clone()
    parameter.mul_(2)
    yield
    parameter.copy_(before)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "resnet"])
def test_calls_name_the_methods_that_read_a_tensor(kind, tmp_path):
    config = RESNET if kind == "resnet" else KINDS[kind]
    backbone = loaded(tmp_path, config).eval()
    network, x, tokens = backbone.network, images(config["vision_cfg"]["image_size"]), backbone.tokenize(PROMPTS)

    def outputs():
        parts = [backbone.suffix(backbone.prefix(x, 1), 1)] if backbone.num_blocks else []
        return torch.cat([backbone(x), *parts, backbone.encode_text(tokens), backbone.learned_scale().expand(1, 32)])

    plain, moved = outputs(), set()
    for site in backbone.sites():
        if site.reader in ("", "visual", "text", "visual.attnpool"):
            with doubled(network, site):
                wanted = outputs()
            with doubled_within_calls(network, site):
                found = outputs()
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=site.name)
            if not torch.equal(wanted, plain):
                moved.add(site.name)
    expected = {"text.pos_embed", "logit_scale"}
    expected |= {"vision.attnpool.q_proj", "vision.attnpool.c_proj"} if kind == "resnet" else {"vision.proj", "vision.class_embedding"}
    assert expected <= moved


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
    monkeypatch.setattr(clip, "download_pretrained_from_hf", lambda repository, filename="weights.pt": str(tmp_path / filename))
    backbone = Clip("hf-hub:owner/tiny")
    backbone.load()
    assert backbone.preprocess.mean == (0.1, 0.2, 0.3)
    torch.testing.assert_close(backbone(images()), source(images()))


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


def test_a_hugging_face_text_tower_runs_at_full_length(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    sizes = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=60, max_position_embeddings=20
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "pad_token_id": 0, **sizes}))
    text = {"hf_model_name": str(tmp_path), "hf_tokenizer_name": "absent", "hf_proj_type": "linear", "context_length": 12}
    backbone = loaded(tmp_path, {**TINY, "text_cfg": text})
    assert {site.path for site in backbone.sites()} == {name for name, _ in backbone.network.named_parameters()}
    monkeypatch.setattr(clip, "tokenizer", lambda text_cfg: lambda prompts: torch.tensor([[2, 5, 6, 3] + [0] * 8] * len(prompts)))
    assert backbone.tokenize(PROMPTS).shape == (3, 12)
    features = backbone.train().text_features(PROMPTS, frozen=True)
    assert features.shape == (3, 32)
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=1e-6)  # BERT's dropout was off
