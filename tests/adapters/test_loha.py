"""LoHa: a product of two products; alive although one factor starts at zero; peft's layer as the oracle."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.loha import LoHa
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    assert torch.equal(started(LoHa(rank=3), W).weight(W), W)


def test_the_formula_entry_by_entry():
    W = weight64()
    adapter = moved(LoHa(rank=3, alpha=2.0), W)
    first, second = adapter.B1 @ adapter.A1, adapter.B2 @ adapter.A2
    expected = torch.stack([torch.stack([2 / 3 * first[i, j] * second[i, j] for j in range(9)]) for i in range(12)])
    torch.testing.assert_close(delta(adapter, W), expected, **EXACT)


def test_exactly_one_factor_starts_at_zero():
    adapter = started(LoHa(rank=3), weight64())
    assert [name for name, factor in adapter.named_parameters() if not factor.any()] == ["A2"]
    for factor, bound in ((adapter.B1, 3**-0.5), (adapter.B2, 3**-0.5), (adapter.A1, 9**-0.5)):
        assert 0.5 * bound < factor.abs().max() <= bound
    assert not torch.equal(adapter.B1, adapter.B2)


def test_alive_at_the_start():
    found = gradients(started(LoHa(rank=3), weight64()), weight64(), weight64())
    assert found["A2"].all()
    assert not any(found[name].any() for name in ("A1", "B1", "B2"))


def test_gradients_by_hand():
    """With H = G * second: dB1 = s H A1^T, dA1 = s B1^T H; the other pair with H = G * first."""
    W, G = weight64(), weight64()
    adapter, s = moved(LoHa(rank=3, alpha=2.0), W), 2 / 3
    found = gradients(adapter, W, G)
    first, second = adapter.B1 @ adapter.A1, adapter.B2 @ adapter.A2
    for H, B, A, name in ((G * second, adapter.B1, adapter.A1, "1"), (G * first, adapter.B2, adapter.A2, "2")):
        torch.testing.assert_close(found["B" + name], s * H @ A.mT, rtol=0, atol=1e-11)
        torch.testing.assert_close(found["A" + name], s * B.mT @ H, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rank, expected", [(1, 1), (2, 4), (3, 9), (5, 20)])
def test_rank_of_the_change_is_the_square(rank, expected):
    W = weight64(24, 20)
    assert torch.linalg.matrix_rank(delta(moved(LoHa(rank=rank), W), W)) == expected


def test_thin_factors_are_the_same_map():
    W = weight64(40, 36)
    adapter = moved(LoHa(rank=3, alpha=2.0), W)
    form = adapter.factored(W)
    assert form.B.shape == (40, 9)
    assert form.A.shape == (9, 36)
    torch.testing.assert_close(form.B @ form.A, delta(adapter, W), rtol=0, atol=1e-12)


def test_thick_factors_are_not_offered():
    assert moved(LoHa(rank=3), weight64(40, 35)).factored(weight64(40, 35)) is None


@pytest.mark.parametrize("width", [12, 80])
def test_the_network_uses_the_definition(width):
    """Narrow: a dense weight. Wide: the thin factors. Same output, same gradients, by the formula."""
    network = nn.Sequential(nn.Linear(width, width))
    adapter = attach(network, LoHa(rank=3, alpha=2.0), "all").adapters["0"]
    nn.init.normal_(adapter.A2)
    assert (adapter.factored(network[0].weight) is None) == (width == 12)
    x, G = torch.randn(5, width), torch.randn(5, width)
    (network(x) * G).sum().backward()
    H = (G.mT @ x) * (adapter.B1 @ adapter.A1).detach()
    torch.testing.assert_close(adapter.A2.grad, 2 / 3 * adapter.B2.detach().mT @ H, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        W = network[0].weight + 2 / 3 * (adapter.B1 @ adapter.A1) * (adapter.B2 @ adapter.A2)
        torch.testing.assert_close(network(x), x @ W.mT + network[0].bias, rtol=1e-4, atol=1e-4)


def test_against_the_layer_of_peft():
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(7, 5))
    adapter = attach(network, LoHa(rank=2, alpha=3.0), "all").adapters["0"]
    nn.init.normal_(adapter.A2)
    twin = nn.Sequential(nn.Linear(7, 5))
    twin.load_state_dict(network.state_dict())
    twin = peft.get_peft_model(twin, peft.LoHaConfig(r=2, alpha=3, target_modules=["0"]))
    layer = twin.base_model.model[0]
    for ours, theirs in (("B1", "hada_w1_a"), ("A1", "hada_w1_b"), ("B2", "hada_w2_a"), ("A2", "hada_w2_b")):
        getattr(layer, theirs)["default"].data.copy_(getattr(adapter, ours).data)
    x = torch.randn(4, 7)
    torch.testing.assert_close(network(x), twin(x), rtol=1e-4, atol=1e-5)


def test_counts():
    """768 x 768 at r = 8: 24,576."""
    assert LoHa(rank=8).count(site(768, 768)) == 24_576
    for shape in ((12, 9), (4, 2, 3, 3)):
        assert trainables(LoHa(rank=3), site(*shape)) == LoHa(rank=3).count(site(*shape))


def test_bad_options():
    with pytest.raises(UserError, match="rank: 0 is not positive"):
        LoHa(rank=0)
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        LoHa(rank=10).adapter(site(12, 9), None)
