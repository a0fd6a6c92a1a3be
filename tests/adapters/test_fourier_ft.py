"""FourierFT: the sum of cosines written out, PEFT's layer as an oracle, and positions that belong to a shape."""

from __future__ import annotations

import copy

import pytest
import torch
from fakes import site, weight64
from torch import nn

from vision_peft.adapters.fourier_ft import FourierFT
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def positions(method, *shapes, seed=0):
    shared = method.shared([site(*shape) for shape in shapes])
    shared.initialize(torch.Generator().manual_seed(seed))
    return shared


def started(method, W, seed=0):
    adapter = method.adapter(site(*W.shape), positions(method, W.shape)).to(W.dtype)
    with torch.no_grad():
        adapter.initialize(W, Evidence(torch.Generator().manual_seed(seed)))
    return adapter


def cosine(shape, place):
    """cos(2 pi (u j / m + v k / n)) for every entry (j, k)."""
    (m, n), (u, v) = shape, divmod(int(place), shape[1])
    j, k = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    return torch.cos(2 * torch.pi * (u * j / m + v * k / n))


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (8, 8)])
def test_the_formula_is_a_sum_of_cosines(shape):
    W = weight64(*shape)
    adapter = started(FourierFT(coefficients=20, scaling=7.0), W)
    waves = [c * cosine(shape, place) for c, place in zip(adapter.c.detach(), adapter.shared.of(shape))]
    torch.testing.assert_close(adapter.weight(W) - W, 7 / W.numel() * sum(waves), **EXACT)


def test_gradients_are_entries_of_the_transformed_gradient():
    W, G = weight64(), weight64()
    adapter = started(FourierFT(coefficients=20, scaling=7.0), W)
    (adapter.weight(W) * G).sum().backward()
    expected = torch.fft.fft2(G).real.flatten()[adapter.shared.of((12, 9))] * 7 / 108
    torch.testing.assert_close(adapter.c.grad, expected, **EXACT)


def test_every_entry_when_there_are_as_many_coefficients():
    """All entries of the spectrum: the update can be any matrix that is even in both indices."""
    W = weight64()
    adapter = started(FourierFT(coefficients=1000, scaling=1.0), W)
    assert sorted(adapter.shared.of((12, 9)).tolist()) == list(range(108))
    D = weight64()
    even = (D + D.flip(0, 1).roll((1, 1), (0, 1))) / 2
    with torch.no_grad():
        adapter.c.copy_(torch.fft.fft2(even).real.flatten()[adapter.shared.of((12, 9))])
    torch.testing.assert_close(adapter.weight(W) - W, even, **EXACT)


def test_starts():
    W = torch.randn(12, 9)
    zero, normal = started(FourierFT(init="zero"), W), started(FourierFT(), W)
    assert torch.equal(zero.weight(W), W)
    assert FourierFT(init="zero").identity_at_init and not FourierFT().identity_at_init
    drawn = started(FourierFT(coefficients=4000), torch.randn(80, 80)).c
    assert abs(float(drawn.detach().std()) - 1) < 0.05
    assert torch.equal(normal.c, started(FourierFT(), W).c) and not torch.equal(normal.c, started(FourierFT(), W, seed=1).c)


def test_positions_are_distinct_and_of_the_shape_alone():
    """Another target of another shape does not move them; another seed does; the transposed shape has its own."""
    method = FourierFT(coefficients=30)
    alone, beside = positions(method, (12, 9)), positions(method, (5, 5), (9, 12), (12, 9))
    assert torch.equal(alone.of((12, 9)), beside.of((12, 9)))
    assert len(set(alone.of((12, 9)).tolist())) == 30
    assert not torch.equal(beside.of((12, 9)), beside.of((9, 12)))
    assert not torch.equal(alone.of((12, 9)), positions(method, (12, 9), seed=1).of((12, 9)))


def test_layers_of_equal_shape_share_positions_but_not_values():
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    adapters = attach(network, FourierFT(coefficients=10), "all")
    first, second, third = adapters.adapters.values()
    assert first.shared is second.shared is third.shared is adapters.shared
    assert not torch.equal(first.c, second.c)
    assert len(list(adapters.shared.buffers())) == 2
    assert not [key for key in adapters.state_dict() if "x" in key], "positions are drawn anew, not saved"
    twin = copy.deepcopy(adapters)
    assert twin.adapters["0"].shared is twin.shared


def test_the_mark_sees_one_moved_position_and_the_order():
    shared = positions(FourierFT(coefficients=1000), (384, 384))
    mark = shared.fingerprint()
    moved, turned = copy.deepcopy(shared), copy.deepcopy(shared)
    moved.of((384, 384))[500] += 1
    turned.of((384, 384))[:2] = shared.of((384, 384))[:2].flip(0)
    for other in (moved, turned, positions(FourierFT(coefficients=1000), (384, 384), seed=1)):
        assert not torch.allclose(other.fingerprint(), mark, rtol=1e-3, atol=1e-4)


def test_loading_onto_other_positions_is_refused():
    states = [attach(nn.Sequential(nn.Linear(8, 8)), FourierFT(coefficients=5), "all", seed=seed) for seed in (0, 1)]
    with pytest.raises(UserError, match="shared bases: the basis recomputed on load"):
        states[0].load_state_dict(states[1].state_dict())


def test_against_the_layer_of_peft():
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(7, 5))
    adapters = attach(network, FourierFT(coefficients=12, scaling=20.0), "all")
    twin = nn.Sequential(nn.Linear(7, 5))
    twin.load_state_dict(network.state_dict())
    twin = peft.get_peft_model(twin, peft.FourierFTConfig(n_frequency=12, scaling=20.0, target_modules=["0"]))
    layer, c = twin.base_model.model[0], adapters.adapters["0"].c
    flat = adapters.shared.of((5, 7))
    layer.indices["default"] = torch.stack([flat // 7, flat % 7])
    layer.fourierft_spectrum["default"].data.copy_(c.data)
    x, G = torch.randn(4, 7), torch.randn(4, 5)
    ours, theirs = network(x), twin(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    (ours * G).sum().backward()
    (theirs * G).sum().backward()
    torch.testing.assert_close(c.grad, layer.fourierft_spectrum["default"].grad, rtol=1e-4, atol=1e-5)


def test_counts():
    """1000 a weight whatever its shape; 24 matrices of ViT-B at 3000: 72,000."""
    assert 24 * FourierFT(coefficients=3000).count(site(768, 768)) == 72_000
    assert FourierFT().count(site(3072, 768)) == 1000
    assert FourierFT().count(site(4, 2, 3, 3)) == 72
    for shape in ((12, 9), (4, 2, 3, 3), (64, 32)):
        adapter = started(FourierFT(), torch.randn(site(*shape).matrix_shape))
        assert sum(p.numel() for p in adapter.parameters()) == FourierFT().count(site(*shape))


@pytest.mark.parametrize("options, message", [({"coefficients": 0}, "coefficients: 0"), ({"init": "ones"}, "init: 'ones' is not one of")])
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        FourierFT(**options)
