"""The sites of CLIP: every parameter once, under canonical names, with the calls that really read it."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest
import torch
from tiny_clip import (
    KINDS,
    PROMPTS,
    RESNET,
    images,
    loaded,
)
from torch import nn

from vision_peft.backbones.clip import Clip


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
