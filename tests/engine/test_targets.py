"""Presets, globs with braces and ranges, and one-line answers to patterns that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vision_peft.engine.adapter import find_method
from vision_peft.engine.site import enumerate_sites, renamer
from vision_peft.engine.targets import expand, fused_qkv, resolve, table
from vision_peft.errors import UserError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleList(Block() for _ in range(12))
        self.vision_stem = nn.Conv2d(3, 8, 4)
        self.text = nn.ModuleList(Block() for _ in range(2))
        self.words = nn.Embedding(10, 8)
        self.proj = nn.Parameter(torch.zeros(8, 4))


@pytest.fixture(scope="module")
def sites():
    with torch.device("meta"):
        return enumerate_sites(Towers(), renamer([(r"vision_stem", "vision.patch_embed")]), fused_qkv)


def names(targets, sites, method="lora") -> list[str]:
    return [site.name for site in resolve(targets, sites, find_method(method)())]


def test_every_parameter_is_one_site_or_three_slices(sites):
    shapes = {key: tensor.shape for key, tensor in Towers().named_parameters()}
    rows = dict.fromkeys(shapes, 0)
    for site in sites:
        rows[site.path] += site.shape[0]
    assert rows == {key: shape[0] for key, shape in shapes.items()}
    assert len({site.name for site in sites}) == len(sites)


@pytest.mark.parametrize(
    "preset, layers",
    [
        ("qv", ["attn.q", "attn.v"]),
        ("qkv", ["attn.q", "attn.k", "attn.v"]),
        ("attn", ["attn.q", "attn.k", "attn.v", "attn.out"]),
        ("mlp", ["mlp.fc1", "mlp.fc2"]),
        ("attn+mlp", ["attn.q", "attn.k", "attn.v", "attn.out", "mlp.fc1", "mlp.fc2"]),
    ],
)
def test_block_presets(preset, layers, sites):
    expected = [f"{tower}.{block}.{layer}" for tower, depth in (("vision", 12), ("text", 2)) for block in range(depth) for layer in layers]
    assert names(preset, sites) == expected
    assert names(f"text:{preset}", sites) == [name for name in expected if name.startswith("text.")]


def test_conv_and_all(sites):
    assert names("conv", sites) == ["vision.patch_embed"]
    everything = names("all", sites, "full")
    assert everything == [site.name for site in sites]
    weights = names("all", sites)
    assert {"words", "proj", "vision.patch_embed"} < set(weights)
    assert not any(name.endswith(".bias") or ".norm" in name for name in weights)
    assert all(name.endswith(".bias") for name in names("all", sites, "bitfit"))


def test_braces_ranges_and_several_patterns_keep_network_order(sites):
    assert names("vision.{9..11}.attn.{v,q}", sites) == [f"vision.{block}.attn.{part}" for block in (9, 10, 11) for part in "qv"]
    assert names(["text.1.mlp.*", "vision.0.attn.out", "vision.0.attn.out"], sites) == [
        "vision.0.attn.out",
        "text.1.mlp.fc1",
        "text.1.mlp.fc2",
    ]
    assert names("text.*", sites)[:4] == ["text.0.attn.q", "text.0.attn.k", "text.0.attn.v", "text.0.attn.out"]
    assert names("vision.1.attn.q", sites, "bitfit") == ["vision.1.attn.q.bias"]
    assert names("vision.1.norm", sites, "full") == ["vision.1.norm.weight", "vision.1.norm.bias"]


def test_expand():
    assert expand("a.{1..3}.{q,v}") == ["a.1.q", "a.1.v", "a.2.q", "a.2.v", "a.3.q", "a.3.v"]
    assert expand("a.{9..11}") == ["a.9", "a.10", "a.11"]
    assert set(expand("{a,b{1,2}}")) == {"a", "b1", "b2"}
    assert expand("plain.*") == ["plain.*"]


@pytest.mark.parametrize(
    "pattern, nearest",
    [
        ("vision.3.atn.q", "vision.3.attn.q"),
        ("vision.{0..3}.attn.query", "vision.0.attn"),
        ("qkvv", "qkv"),
        ("attn+mpl", "attn+mlp"),
        ("wrds", "words"),
    ],
)
def test_a_pattern_without_match_names_the_nearest(pattern, nearest, sites):
    with pytest.raises(UserError) as caught:
        names(pattern, sites)
    message = str(caught.value)
    assert repr(pattern) in message
    assert "matches no layer" in message
    assert nearest in message
    assert "\n" not in message


def test_one_bad_pattern_among_good_ones_is_still_an_error(sites):
    with pytest.raises(UserError, match=r"vision\.12\.attn\.q"):
        names(["qkv", "vision.12.attn.q"], sites)


@pytest.mark.parametrize(
    "pattern, method, message",
    [
        ("vision.0.norm", "lora", r"'vision.0.norm' matches 2 tensors, but lora adapts weight tensors only"),
        ("proj", "bitfit", r"'proj' matches 1 tensors, but bitfit adapts bias tensors only"),
        ([], "lora", "empty"),
        ("vision.{11..6}.attn.q", "lora", r"empty range, \{11\.\.6\}"),
        ("audio:qkv", "lora", "matches no layer"),
    ],
)
def test_patterns_that_do_not_fit_the_method(pattern, method, message, sites):
    with pytest.raises(UserError, match=message):
        names(pattern, sites, method)


def test_a_network_without_parameters_is_answered_in_one_line():
    with pytest.raises(UserError, match="no parameters"):
        names("qkv", [])


def test_only_a_true_qkv_projection_is_cut():
    assert fused_qkv("blocks.0.attn.qkv", nn.Linear(8, 24)) == ["blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.attn.v"]
    assert fused_qkv("qkv", nn.Linear(8, 24)) == ["q", "k", "v"]
    assert fused_qkv("attn.qkv", nn.Linear(8, 16)) is None
    assert fused_qkv("attn.kqv", nn.Linear(8, 24)) is None


def test_table_counts(sites):
    method = find_method("lora")(rank=2)
    chosen = resolve("text:mlp", sites, method)
    lines = table(chosen, method).splitlines()
    assert lines[2].split() == ["text.0.mlp.fc1", "linear", "16", "x", "8", "1", "48", "0.2", "0.8"]
    assert len(lines) == len(chosen) + 4
    assert lines[-1].split()[:3] == ["total", "4", "192"]


def test_collapsed_table_has_a_row_for_what_differs_in_its_block_only(sites):
    method = find_method("lora")(rank=2)
    lines = table(resolve(["qv", "words"], sites, method), method, collapse=True).splitlines()
    rows = [line.split() for line in lines[2:-2]]
    assert [row[0] for row in rows] == [
        "vision.{0..11}.attn.q",
        "vision.{0..11}.attn.v",
        "text.{0..1}.attn.q",
        "text.{0..1}.attn.v",
        "words",
    ]
    assert [row[5] for row in rows] == ["12", "12", "2", "2", "1"]
    assert lines[-1].split()[:3] == ["total", "29", f"{28 * 2 * 16 + 2 * 18}"]
