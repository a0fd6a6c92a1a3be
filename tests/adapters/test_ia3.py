"""(IA)3: which side is rescaled where, cheap paths against the definition, and peft's layer as the oracle."""

from __future__ import annotations

import pytest
import torch
from fakes import gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.ia3 import IA3, InputScaleAdapter, OutputScaleAdapter
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

SIDES = ("output", "input")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize("side", SIDES)
def test_starts_at_the_identity_bit_for_bit(side):
    W = torch.randn(12, 9)
    assert torch.equal(started(IA3(side), W).weight(W), W)


@pytest.mark.parametrize("side", SIDES)
def test_the_formula(side):
    W = weight64()
    adapter = moved(IA3(side), W)
    D = torch.diag(adapter.l.detach())
    torch.testing.assert_close(adapter.weight(W), D @ W if side == "output" else W @ D, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_gradients(side):
    """dL/dl = row sums (output) or column sums (input) of G * W."""
    W, G = weight64(), weight64()
    found = gradients(moved(IA3(side), W), W, G)
    torch.testing.assert_close(found["l"], (G * W).sum(1 if side == "output" else 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name, kind",
    [("vision.0.attn.k", OutputScaleAdapter), ("vision.0.attn.v", OutputScaleAdapter), ("vision.0.mlp.fc2", InputScaleAdapter)],
)
def test_the_conventional_placement(name, kind):
    assert type(IA3().adapter(site(12, 9, name=name), None)) is kind
    assert type(IA3("output").adapter(site(12, 9, name=name), None)) is OutputScaleAdapter
    assert type(IA3("input").adapter(site(12, 9, name=name), None)) is InputScaleAdapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", SIDES)
def test_the_network_computes_and_learns_by_the_definition(side, dtype):
    network = nn.Sequential(nn.Linear(9, 12)).to(dtype)
    adapter = attach(network, IA3(side), "all").adapters["0"]
    with torch.no_grad():
        adapter.l.uniform_(0.5, 1.5)
    x, G = torch.randn(5, 9, dtype=dtype), torch.randn(5, 12, dtype=dtype)
    y = network(x)
    (y * G).sum().backward()
    W, b, scale = network[0].weight.detach().float(), network[0].bias.detach().float(), adapter.l.detach()
    expected = (x.float() @ W.mT) * scale + b if side == "output" else (x.float() * scale) @ W.mT + b
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, **tolerance)
    weighted = (G.float().mT @ x.float()) * W
    torch.testing.assert_close(adapter.l.grad, weighted.sum(1 if side == "output" else 0), **tolerance)


def test_no_dense_weight_gradient_is_built():
    """The weight used in place of the frozen one is never made on the cheap paths."""
    for side in SIDES:
        network = nn.Sequential(nn.Linear(9, 12))
        adapter = attach(network, IA3(side), "all").adapters["0"]
        adapter.weight = None  # calling it would raise
        network(torch.randn(5, 9)).sum().backward()
        assert adapter.l.grad.any()


def test_scaling_the_input_of_fc2_is_scaling_the_hidden_features():
    network = Mlp()
    adapter = attach(network, IA3(), "fc2").adapters["fc2"]
    nn.init.uniform_(adapter.l, 0.5, 1.5)
    x = torch.randn(3, 6)
    hidden = torch.relu(nn.functional.linear(x, network.fc1.weight, network.fc1.bias))
    expected = nn.functional.linear(hidden * adapter.l, network.fc2.weight, network.fc2.bias)
    torch.testing.assert_close(network(x), expected)


def test_against_the_layer_of_peft():
    """peft rescales the whole output, so that layer is compared without bias."""
    peft = pytest.importorskip("peft")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.fc2 = nn.Linear(6, 8, bias=False), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc2(self.k(x).relu())

    network, twin = Two(), Two()
    twin.load_state_dict(network.state_dict())
    adapters = attach(network, IA3(), "all").adapters
    twin = peft.get_peft_model(twin, peft.IA3Config(target_modules=["k", "fc2"], feedforward_modules=["fc2"]))
    for name in ("k", "fc2"):
        theirs = getattr(twin.base_model.model, name).ia3_l["default"]
        with torch.no_grad():
            adapters[name].l.uniform_(0.5, 1.5)
            theirs.copy_(adapters[name].l.view(theirs.shape))
    x = torch.randn(4, 6)
    torch.testing.assert_close(network(x), twin(x), rtol=1e-5, atol=1e-6)


def test_multipliers_are_not_decayed():
    network = nn.Sequential(nn.Linear(9, 12))
    adapters = attach(network, IA3(), "all")
    optimizer = torch.optim.AdamW(adapters.param_groups(1e-2), lr=1e-2, weight_decay=0.5)
    adapters.adapters["0"].l.grad = torch.zeros(12)
    optimizer.step()
    assert torch.equal(adapters.adapters["0"].l, torch.ones(12))


def test_counts():
    assert IA3().count(site(768, 3072, name="vision.0.mlp.fc2")) == 3072
    assert IA3().count(site(768, 768, name="vision.0.attn.k")) == 768
    for side in (*SIDES, "conventional"):
        for shape in ((12, 9), (4, 2, 3, 3)):
            assert trainables(IA3(side), site(*shape)) == IA3(side).count(site(*shape))


def test_bad_options():
    with pytest.raises(UserError, match="side: 'left' is not one of conventional, output, input"):
        IA3("left")
