"""Evidence against full-batch autograd and against covariances written out by hand; the network afterwards is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vision_peft.engine.adapter import find_method
from vision_peft.engine.evidence import collect
from vision_peft.engine.install import attach, detach
from vision_peft.engine.site import enumerate_sites
from vision_peft.engine.targets import fused_qkv
from vision_peft.errors import UserError


def sites_of(network: nn.Module, *names: str):
    sites = enumerate_sites(network, fused=fused_qkv)
    return [site for site in sites if site.name in names] if names else sites


def covariance(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.double()
    return sum(torch.outer(row, row) for row in rows) / len(rows)


# gradients


def test_gradient_is_the_mean_over_batches():
    network = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3))
    x, target = torch.randn(12, 5), torch.randn(12, 3)
    batches = [(x[i : i + 4], target[i : i + 4]) for i in range(0, 12, 4)]
    loss = lambda batch: (network(batch[0]) - batch[1]).square().mean()
    sites = sites_of(network, "0", "2", "2.bias")
    found = collect(network, sites, ["gradient"], batches, loss)
    full = torch.autograd.grad(loss((x, target)), [network[0].weight, network[2].weight, network[2].bias])
    for site, gradient in zip(sites, full):
        torch.testing.assert_close(found[site.name].gradient, site.matrix(gradient))
        assert found[site.name].covariance is None


def test_gradients_of_slices_and_kernels_have_the_shape_of_their_matrix():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.qkv = nn.Conv2d(2, 4, 3), nn.Linear(4, 12)

        def forward(self, x):
            return self.qkv(self.conv(x).flatten(2).mT)

    network, x = Network(), torch.randn(2, 2, 5, 5)
    sites = sites_of(network, "conv", "q", "v")
    found = collect(network, sites, ["gradient"], [x], lambda x: network(x).square().sum())
    conv, qkv = torch.autograd.grad(network(x).square().sum(), [network.conv.weight, network.qkv.weight])
    torch.testing.assert_close(found["conv"].gradient, conv.reshape(4, 18))
    torch.testing.assert_close(found["q"].gradient, qkv[:4])
    torch.testing.assert_close(found["v"].gradient, qkv[8:])


def test_the_network_is_as_it_was():
    """Flags, gradients of any parameter, running statistics, readers, the random generator's users: nothing is left over."""
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2))
    network[0].requires_grad_(False)
    network[3].weight.grad = torch.full_like(network[3].weight, 7.0)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    found = collect(
        network,
        sites_of(network, "0", "3"),
        ["gradient", "covariance"],
        [torch.randn(4, 2, 5, 5)] * 2,
        lambda x: network(x).square().mean(),
    )
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == [False, False, True, True, True, True]
    assert (network[3].weight.grad == 7).all()
    assert all(p.grad is None for name, p in network.named_parameters() if name != "3.weight")
    assert not any("forward" in module.__dict__ for module in network.modules())
    assert found["3"].gradient.abs().max() < 5, "an old gradient must not leak into the evidence"


def test_the_network_is_as_it_was_after_an_error():
    network = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)

    def loss(batch):
        network(batch)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        collect(network, sites_of(network, "0"), ["gradient", "covariance"], [torch.randn(2, 4)], loss)
    assert not network[0].weight.requires_grad
    assert "forward" not in network[0].__dict__


# covariances


def test_covariance_of_a_linear_layer_over_batches_of_unequal_size():
    network = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(7, 2, 5)
    found = collect(network, sites_of(network, "0", "2"), ["covariance"], [x[:2], x[2:]], lambda x: network(x).sum())
    hidden = torch.relu(network[0](x)).detach()
    torch.testing.assert_close(found["0"].covariance.double(), covariance(x.reshape(-1, 5)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["2"].covariance.double(), covariance(hidden.reshape(-1, 4)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("how", ["keywords", "positions"])
def test_covariance_of_attention_inputs(batch_first, how):
    """q, k, v see the tokens; the output projection sees what attention makes of them."""
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    network = nn.ModuleDict({"attn": attention})
    x = torch.randn(3, 5, 8) if batch_first else torch.randn(5, 3, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if how == "keywords":
        loss = lambda x: attention(query=x, key=x, value=x, need_weights=False, attn_mask=mask)[0].sum()
    else:
        loss = lambda x: attention(x, x, x, None, False, mask)[0].sum()
    found = collect(network, sites_of(network, "attn.q", "attn.v", "attn.out"), ["covariance"], [x], loss)
    tokens = x if batch_first else x.transpose(0, 1)
    q, k, v = (
        (tokens @ W.mT + b).unflatten(-1, (2, 4)).transpose(1, 2)
        for W, b in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3))
    )
    scores = (q @ k.mT / 2).masked_fill(mask, float("-inf"))
    heads = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 8).detach()
    torch.testing.assert_close(found["attn.q"].covariance.double(), covariance(tokens.reshape(-1, 8)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["attn.v"].covariance, found["attn.q"].covariance)
    torch.testing.assert_close(found["attn.out"].covariance.double(), covariance(heads), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_covariance_of_convolution_patches(groups):
    conv = nn.Conv2d(4, 8, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), groups=groups)
    network = nn.Sequential(conv)
    x = torch.randn(2, 4, 6, 7)
    found = collect(network, sites_of(network, "0"), ["covariance"], [x], lambda x: network(x).sum())["0"].covariance
    padded, rows = nn.functional.pad(x, (0, 0, 1, 1)), []
    height, width = network(x).shape[2:]
    for image in padded:
        for i in range(height):
            for j in range(width):
                patch = image[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3 : 2]  # (channels, 3, 2)
                rows += [part.reshape(-1) for part in patch.chunk(groups)]
    assert found.shape == (4 // groups * 6,) * 2
    torch.testing.assert_close(found.double(), covariance(torch.stack(rows)), rtol=1e-5, atol=1e-6)


def test_covariance_under_autocast_is_summed_in_float32():
    """Thousands of rows: a bfloat16 sum would be off by percents."""
    network = nn.Sequential(nn.Linear(4, 2))
    x = torch.rand(6, 500, 4).bfloat16().float()

    def loss(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return network(batch).sum()

    found = collect(network, sites_of(network, "0"), ["covariance"], list(x), loss)["0"].covariance
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), covariance(x.reshape(-1, 4)), rtol=1e-5, atol=1e-6)


def test_evidence_beside_adapters_leaves_them_in_place():
    network = nn.Sequential(nn.Linear(4, 4))
    adapters = attach(network, find_method("lora")(rank=2), "all")
    nn.init.normal_(adapters.adapters["0"].B)
    x = torch.randn(3, 4)
    before = network(x)
    collect(network, sites_of(network, "0"), ["covariance"], [x], lambda x: network(x).sum())
    assert torch.equal(network(x), before)
    detach(network)
    assert "forward" not in network[0].__dict__


# what cannot be collected


class SameConv(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


@pytest.mark.parametrize(
    "network, message",
    [
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding="same")), "padding 'same'"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), "reflect"),
        (nn.Sequential(SameConv(2, 2, 2)), "SameConv"),
    ],
)
def test_convolutions_whose_patches_are_not_known_are_refused(network, message):
    with pytest.raises(UserError, match=message):
        collect(network, sites_of(network, "0"), ["covariance"], [torch.randn(1, 2, 5, 5)], lambda x: network(x).sum())
    assert "forward" not in network[0].__dict__


def test_attention_whose_inputs_are_not_known_is_refused():
    network = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)})
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    for loss in (lambda x: network["attn"](x, x.flip(1), x.flip(1))[0].sum(), lambda x: network["attn"](x, x, x, padding)[0].sum()):
        with pytest.raises(UserError, match="self-attention"):
            collect(network, sites_of(network, "attn.out"), ["covariance"], [x], loss)


def test_missing_evidence_is_one_clear_line():
    network = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4), "words": nn.Embedding(3, 4)})
    loss, x = (lambda x: network["used"](x).sum()), torch.randn(2, 4)
    with pytest.raises(UserError, match="no calibration batch"):
        collect(network, sites_of(network, "used"), ["gradient"], [], loss)
    with pytest.raises(UserError, match="no gradient reached idle"):
        collect(network, sites_of(network, "used", "idle"), ["gradient"], [x], loss)
    with pytest.raises(UserError, match="input of idle was never seen"):
        collect(network, sites_of(network, "used", "idle"), ["covariance"], [x], loss)
    with pytest.raises(UserError, match=r"words \(embedding\)"):
        collect(network, sites_of(network, "words"), ["covariance"], [x], loss)
