"""ShareLoRA: what is one tensor for all layers, what each keeps, and how narrower layers take their part."""

from __future__ import annotations

import copy

import pytest
import torch
from fakes import site
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.share_lora import ShareLoRA
from vision_peft.engine.install import attach, installed
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError

SHARES = ("A", "B", "both")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 15))


def adapted(share, **options):
    """The network, its adapters as if trained, and each layer's (A, B) by the definition."""
    net = network()
    adapters = attach(net, ShareLoRA(rank=3, share=share, **options), "all", seed=3)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    shared, pairs = adapters.shared, {}
    for name, layer in (("0", net[0]), ("2", net[2])):
        own = adapters.adapters[name]
        A = own.A if share == "B" else shared.A[:, : layer.in_features]
        B = own.B if share == "A" else shared.B[: layer.out_features]
        pairs[name] = (A, B)
    return net, adapters, pairs


@pytest.mark.parametrize("share", SHARES)
def test_starts_at_the_identity(share):
    net = network()
    x = torch.randn(4, 12)
    before = net(x)
    attach(net, ShareLoRA(rank=3, share=share), "all")
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("share", SHARES)
def test_the_formula(share):
    net, adapters, pairs = adapted(share, alpha=2.0)
    for name, (A, B) in pairs.items():
        W = net[int(name)].weight
        torch.testing.assert_close(adapters.adapters[name].weight(W), W + 2 / 3 * B @ A)


@pytest.mark.parametrize("share", SHARES)
def test_what_is_saved_where(share):
    expected = {"A": {"shared.A", "adapters.0.B", "adapters.2.B"}, "B": {"shared.B", "adapters.0.A", "adapters.2.A"}}
    expected["both"] = {"shared.A", "shared.B"}
    assert set(adapted(share)[1].state_dict()) == expected[share]


def test_sizes_of_the_shared_pair_are_the_largest():
    shared = adapted("both")[1].shared
    assert shared.A.shape == (3, 12)
    assert shared.B.shape == (15, 3)


def test_both_shared_gives_every_layer_the_same_update():
    net, adapters, _ = adapted("both")
    first, second = (adapters.adapters[name].weight(net[int(name)].weight) - net[int(name)].weight for name in ("0", "2"))
    torch.testing.assert_close(first[:, :9], second[:9], rtol=1e-4, atol=1e-5)


def test_the_shared_factor_learns_from_all_layers():
    """dL/dA = sum over the layers of s B_l^T G_l, each into its own columns."""
    net, adapters, pairs = adapted("A", alpha=3.0)
    G = {name: torch.randn_like(net[int(name)].weight) for name in pairs}
    sum((adapters.adapters[name].weight(net[int(name)].weight) * G[name]).sum() for name in pairs).backward()
    expected = torch.zeros(3, 12)
    for name, (_, B) in pairs.items():
        part = B.detach().mT @ G[name]
        expected[:, : part.shape[1]] += part
    torch.testing.assert_close(adapters.shared.A.grad, expected, rtol=1e-4, atol=1e-4)


def test_for_one_layer_it_is_lora():
    net = nn.Sequential(nn.Linear(7, 5))
    twin = copy.deepcopy(net)
    ours = attach(net, ShareLoRA(rank=2, alpha=3.0), "all")
    lora = attach(twin, LoRA(rank=2, alpha=3.0), "all").adapters["0"]
    with torch.no_grad():
        ours.adapters["0"].B.normal_()
        lora.B.copy_(ours.adapters["0"].B)
        lora.A.copy_(ours.shared.A)
    x = torch.randn(4, 7)
    assert torch.equal(net(x), twin(x))


def test_start_depends_on_the_seed_alone():
    starts = [attach(network(), ShareLoRA(rank=3), "all", seed=seed).shared.A for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert starts[0].abs().max() <= 12**-0.5


@pytest.mark.parametrize("share", SHARES)
def test_saved_and_copied(share, tmp_path):
    net, _, _ = adapted(share)
    x = torch.randn(4, 12)
    before = net(x)
    save_adapter(tmp_path / "adapter", net)
    fresh = network()
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(fresh(x), before)
    twin = installed(copy.deepcopy(net))["default"]
    assert twin.adapters["0"].shared is twin.shared is twin.adapters["2"].shared
    assert twin.shared is not installed(net)["default"].shared


def test_counts():
    """Twelve 768 x 768 weights at r = 8: 12 * 6,144 + 6,144 with A shared, half of LoRA's and one more."""
    sites = [site(768, 768, name=f"vision.{i}.attn.q") for i in range(12)]
    for share, own, common in (("A", 12 * 6_144, 6_144), ("B", 12 * 6_144, 6_144), ("both", 0, 12_288)):
        method = ShareLoRA(rank=8, share=share)
        shared = method.shared(sites)
        assert sum(method.count(each) for each in sites) == own
        assert sum(p.numel() for p in shared.parameters()) == common
        assert sum(p.numel() for each in sites for p in method.adapter(each, shared).parameters()) == own


@pytest.mark.parametrize(
    "options, message",
    [
        ({"share": "C"}, "share: 'C' is not one of A, B, both"),
        ({"rank": 0}, "rank: 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"scaling": "no"}, "scaling"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        ShareLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        attach(network(), ShareLoRA(rank=10), "all")
