"""Readers run the module's function on effective weights; several sets, mixes, merging and detaching leave nothing behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kinds import KINDS, Multihead, quietly, small
from torch import nn

from vision_peft.engine.adapter import find_method
from vision_peft.engine.install import activate, adapters_off, attach, detach, installed, merge, unmerge
from vision_peft.engine.readers import AttentionReader, FusedReader, LinearReader, make_reader
from vision_peft.engine.views import State
from vision_peft.errors import UserError

BATCH, LENGTH, WIDTH, HEADS = 2, 5, 16, 4


def lora(rank: int = 2, **options):
    return find_method("lora")(rank=rank, **options)


def stir(*modules: nn.Module) -> None:
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)


def masks() -> dict[str, torch.Tensor | None]:
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return {
        "none": None,
        "bool": causal,
        "float": torch.randn(LENGTH, LENGTH),
        "bool 3-D": causal.expand(BATCH * HEADS, LENGTH, LENGTH) & (torch.rand(BATCH * HEADS, LENGTH, LENGTH) > 0.3),
        "float 3-D": torch.randn(BATCH * HEADS, LENGTH, LENGTH),
    }


# nn.MultiheadAttention


@pytest.mark.parametrize("mask", list(masks()))
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_equals_torchs_own_with_the_merged_weights(mask, batch_first, bias):
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, bias=bias)
    network = nn.ModuleDict({"attn": attention})
    adapters = attach(network, lora(), "all")
    stir(adapters)
    x = torch.randn(BATCH, LENGTH, WIDTH) if batch_first else torch.randn(LENGTH, BATCH, WIDTH)
    drawn = masks()[mask]
    ours, weights = attention(x, x, x, need_weights=False, attn_mask=drawn)
    assert weights is None
    assert isinstance(attention.forward.reader, AttentionReader)
    merge(network)
    torch.testing.assert_close(ours, attention(x, x, x, need_weights=False, attn_mask=drawn)[0], rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="merged"), adapters_off(network):
        pass


def test_attention_arguments_by_position_and_by_name():
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    network = nn.ModuleDict({"attn": attention})
    stir(attach(network, lora(), "all"))
    x, mask = torch.randn(BATCH, LENGTH, WIDTH), masks()["bool"]
    assert torch.equal(attention(x, x, x, None, False, mask)[0], attention(query=x, key=x, value=x, need_weights=False, attn_mask=mask)[0])


def test_attention_weights_padding_and_unbatched_input_are_torchs_own():
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    network = nn.ModuleDict({"attn": attention})
    stir(attach(network, lora(), "all"))
    x = torch.randn(BATCH, LENGTH, WIDTH)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[:, -2:] = True
    calls = [
        lambda: attention(x, x, x),
        lambda: attention(x, x, x, average_attn_weights=False),
        lambda: attention(x, x, x, key_padding_mask=padding, need_weights=False),
        lambda: attention(x[0], x[0], x[0], need_weights=False),
        lambda: attention(x, x.flip(1), x, need_weights=False),
    ]
    adapted = [call() for call in calls]
    merge(network)
    for ours, call in zip(adapted, calls):
        own = call()
        torch.testing.assert_close(ours[0], own[0], rtol=1e-3, atol=1e-4)
        assert (ours[1] is None) == (own[1] is None)
        if own[1] is not None:
            torch.testing.assert_close(ours[1], own[1], rtol=1e-3, atol=1e-4)


def test_a_causal_hint_without_a_mask_is_refused_as_torch_does():
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    attach(nn.ModuleDict({"attn": attention}), lora(), "all")
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with pytest.raises(RuntimeError, match="attn_mask"):
        attention(x, x, x, need_weights=False, is_causal=True)


def test_attention_dropout_of_the_module_stays():
    network = nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True)})
    attach(network, lora(), "all")
    x = torch.randn(BATCH, LENGTH, WIDTH)
    run = lambda: network["attn"](x, x, x, need_weights=False)[0]
    assert not torch.equal(run(), run())
    network.eval()
    assert torch.equal(run(), run())


def test_encoder_layers_do_not_bypass_the_adapters_in_eval_mode():
    """torch's fused kernel reads linear1.weight and the like without calling the layers."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 20, dropout=0.0, batch_first=True)
    network = nn.ModuleDict({"layer": layer})
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        frozen = network.eval()["layer"](x)
        stir(attach(network, lora(), ["layer.linear1", "layer.self_attn.q"]))
        assert isinstance(layer.forward.reader, FusedReader)
        ours = layer(x)
        torch.testing.assert_close(ours, network.train()["layer"](x), rtol=1e-3, atol=1e-4)
        assert (ours - frozen).abs().max() > 0.1
        assert torch.backends.mha.get_fastpath_enabled()
    detach(network)
    assert not any("forward" in module.__dict__ for module in network.modules())


# other modules


class SameConv(nn.Conv2d):
    """As timm's Conv2dSame: pads by the input's size, reads self.weight in a forward of its own."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def test_subclass_with_its_own_forward_sees_effective_weights():
    network = nn.ModuleDict({"conv": SameConv(3, 4, 2, stride=2)})
    adapters = attach(network, lora(), "conv")
    stir(adapters)
    x, adapter = torch.randn(2, 3, 5, 5), adapters.adapters["conv"]
    weight = network["conv"].weight + (adapter.scale * adapter.B @ adapter.A).view_as(network["conv"].weight)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, network["conv"].bias, 2)
    torch.testing.assert_close(network["conv"](x), expected)
    assert "weight" not in network["conv"].__dict__


class Shares(nn.Module):
    """Reads its child's weight itself and calls the child as well: both readers shadow it at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = SubLinear(4, 4)

    def forward(self, x):
        return self.fc(x) @ self.fc.weight + F.linear(x, self.fc.weight)


class SubLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def test_nested_shadows():
    from dataclasses import replace

    network = nn.Sequential(Shares())
    sites = KINDS["linear"].sites(network)
    inner = next(site for site in sites if site.name == "0.fc")
    outer = replace(inner, name="0.outer", target="0.outer", reader="0", parameter="fc.weight")
    first = attach(network, find_method("full")(), "0.fc", sites=[inner], name="first")
    second = attach(network, find_method("full")(), "0.outer", sites=[outer], name="second")
    activate(network, {"first": 1.0, "second": 1.0})
    stir(first, second)
    W, b = network[0].fc.weight, network[0].fc.bias
    D1, D2 = first.adapters["0/fc"].D, second.adapters["0/outer"].D
    x = torch.randn(3, 4)
    torch.testing.assert_close(network(x), F.linear(x, W + D1, b) @ (W + D2) + F.linear(x, W + D2))
    assert "weight" not in network[0].fc.__dict__


def test_a_shadow_is_lifted_when_the_module_raises():
    network = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 2)})
    attach(network, lora(), "conv")
    with pytest.raises(RuntimeError):
        network["conv"](torch.randn(2, 5, 4, 4))
    assert "weight" not in network["conv"].__dict__
    assert isinstance(network["conv"].weight, nn.Parameter)


def test_linear_takes_its_input_by_name():
    network = nn.ModuleDict({"fc": nn.Linear(4, 3)})
    attach(network, lora(), "fc")
    x = torch.randn(2, 4)
    assert torch.equal(network["fc"](input=x), network["fc"](x))


@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_a_forward_put_on_the_instance_by_others_is_called(kind):
    linear, attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 1, batch_first=True)
    module, x = (linear, torch.randn(2, 4)) if kind == "linear" else (attention, torch.randn(2, 3, 4))
    own, seen = module.forward, []

    def theirs(*args, **kwargs):
        seen.append(1)
        return own(*args, **kwargs)

    call = (lambda: linear(x)) if kind == "linear" else (lambda: attention(x, x, x, need_weights=False)[0])
    module.forward = theirs
    network = nn.ModuleDict({"layer": module})
    stir(attach(network, lora(), "all"))
    ours = call()
    assert seen
    merge(network)
    torch.testing.assert_close(ours, call(), rtol=1e-3, atol=1e-4)
    unmerge(network)
    detach(network)
    assert module.forward is theirs


def test_plain_modules_get_the_cheap_readers():
    assert type(make_reader(nn.Linear(2, 2), State(), ("forward",))) is LinearReader
    assert type(make_reader(SubLinear(2, 2), State(), ("forward",))) is not LinearReader
    assert type(make_reader(nn.MultiheadAttention(4, 1), State(), ("forward",))) is AttentionReader


# several sets on one network


@pytest.mark.parametrize("kind", ["linear", "fused_qkv", "mha", "conv", "bare_method"])
def test_activate_mix_and_detach_in_any_order(kind):
    forward, network = KINDS[kind].forward(), KINDS[kind].network().eval()
    network.requires_grad_(False)
    forwards = {path: module.__dict__.get("forward") for path, module in network.named_modules()}
    frozen = forward(network)
    sites = KINDS[kind].sites(network)
    first = attach(network, lora(), KINDS[kind].targets, sites=sites, name="first")
    second = quietly(attach, network, small("full"), KINDS[kind].targets, sites=sites, name="second")
    stir(first, second)
    with torch.no_grad():
        out_second = forward(network)  # the set attached last is active
        activate(network, "first")
        out_first = forward(network)
        activate(network, {"first": 0.5, "second": -0.25})
        mixed = forward(network)
        merge(network)
        torch.testing.assert_close(forward(network), mixed, rtol=1e-3, atol=1e-4)
        unmerge(network)
        activate(network, {"first": 1.0, "second": 0.0})
        torch.testing.assert_close(forward(network), out_first, rtol=1e-3, atol=1e-4)
        with adapters_off(network):
            assert torch.equal(forward(network), frozen)
            with adapters_off(network):
                pass
            assert torch.equal(forward(network), frozen)
        detach(network, "first")  # put on first, taken off first
        assert set(installed(network)) == {"second"}
        activate(network, "second")
        assert torch.equal(forward(network), out_second)
        assert not torch.equal(out_first, out_second)
        detach(network, "second")
        assert torch.equal(forward(network), frozen)
    assert {path: module.__dict__.get("forward") for path, module in network.named_modules()} == forwards
    assert not installed(network)


def test_a_mix_is_the_weighted_sum_of_the_changes():
    network = nn.ModuleDict({"fc": nn.Linear(6, 5)})
    sets = {name: attach(network, lora(), "fc", name=name) for name in "ab"}
    stir(*sets.values())
    activate(network, {"a": 0.3, "b": 2.0})
    D = {name: each.adapters["fc"].scale * each.adapters["fc"].B @ each.adapters["fc"].A for name, each in sets.items()}
    x = torch.randn(4, 6)
    torch.testing.assert_close(network["fc"](x), F.linear(x, network["fc"].weight + 0.3 * D["a"] + 2 * D["b"], network["fc"].bias))


def test_two_sets_on_different_slices_of_one_weight_act_together():
    forward, network = KINDS["fused_qkv"].forward(), KINDS["fused_qkv"].network()
    sites = KINDS["fused_qkv"].sites(network)
    sets = [attach(network, lora(), f"attn.{part}", sites=sites, name=part) for part in "qv"]
    stir(*sets)
    activate(network, {"q": 1.0, "v": 1.0})
    both = forward(network)
    merge(network)
    torch.testing.assert_close(both, forward(network), rtol=1e-3, atol=1e-4)


def test_adapters_off_reaches_networks_inside_a_model_and_ends_after_an_error():
    network = nn.Sequential(nn.Linear(4, 4))
    model = nn.ModuleDict({"inner": network})
    x = torch.randn(2, 4)
    frozen = network(x)
    stir(attach(network, lora(), "all"))
    with pytest.raises(ValueError, match="stop"), adapters_off(model):
        assert torch.equal(network(x), frozen)
        raise ValueError("stop")
    assert not torch.equal(network(x), frozen)


# installing


def test_names_and_states_that_do_not_fit_are_refused():
    network = nn.Sequential(nn.Linear(4, 4))
    for action in (lambda: detach(network), lambda: merge(network), lambda: activate(network, "a")):
        with pytest.raises(UserError, match="no adapters are attached"):
            action()
    attach(network, lora(), "all", name="a")
    with pytest.raises(UserError, match="'a' is already attached"):
        attach(network, lora(), "all", name="a")
    with pytest.raises(UserError, match="no adapter set named 'b'"):
        activate(network, "b")
    with pytest.raises(UserError, match="no adapter set named 'b'"):
        detach(network, "b")
    merge(network)
    for action in (lambda: attach(network, lora(), "all", name="b"), lambda: detach(network), lambda: activate(network, "a")):
        with pytest.raises(UserError, match="unmerge"):
            action()


def test_a_failed_attach_leaves_the_network_as_it_was():
    network = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match="rank"):
        attach(network, lora(5), "all")
    assert network[0].weight.requires_grad
    assert "forward" not in network[0].__dict__
    assert not installed(network)


def test_a_merge_that_fails_half_way_is_undone():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapters = attach(network, lora(), "all")
    stir(adapters)
    before = [layer.weight.clone() for layer in network]
    adapters.adapters["1"].B = nn.Parameter(torch.zeros(3, 2))  # no longer fits
    with pytest.raises(RuntimeError):
        merge(network)
    assert all(torch.equal(layer.weight, value) for layer, value in zip(network, before))


def test_dropout_that_cannot_act_is_announced():
    network = nn.Sequential(nn.Conv2d(2, 2, 2), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"none at 1 other sites \(0"):
        attach(network, lora(dropout=0.5), "all")


def test_attach_leaves_keys_children_and_hooks_alone():
    network = Multihead(True, "none")
    keys, children = list(network.state_dict()), list(network.named_modules())
    attach(network, lora(), "all")
    assert list(network.state_dict()) == keys
    assert list(network.named_modules()) == children
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_backbone_weights_loaded_after_attaching_are_used():
    network, other = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    attach(network, lora(), "all")
    network.load_state_dict(other.state_dict())
    x = torch.randn(2, 4)
    torch.testing.assert_close(network(x), other(x))


def test_starts_do_not_depend_on_the_other_targets():
    build = lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    both, one = attach(build(), lora(), "all", seed=5), attach(build(), lora(), "1", seed=5)
    other = attach(build(), lora(), "1", seed=6)
    assert torch.equal(both.adapters["1"].A, one.adapters["1"].A)
    assert not torch.equal(both.adapters["0"].A, both.adapters["1"].A)
    assert not torch.equal(one.adapters["1"].A, other.adapters["1"].A)
