"""VeRA: one random pair for all layers, two trained vectors for each."""

from __future__ import annotations

import copy

import pytest
import torch
from fakes import delta, gradients, site, weight64
from safetensors.torch import load_file, save_file
from torch import nn

from vision_peft.adapters.vera import VeRA
from vision_peft.engine.install import attach
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError


def attached(method, *shapes, seed=0, stirred=True):
    """An adapter set in float64 on matrices of these shapes; `stirred`: trained numbers off their start."""
    network = nn.ModuleList([nn.Linear(columns, out, bias=False) for out, columns in shapes])
    adapters = attach(network, method, "all", seed=seed).double()
    if stirred:
        with torch.no_grad():
            for parameter in adapters.parameters():
                parameter.add_(torch.randn_like(parameter))
    return adapters


def test_starts_at_the_identity_bit_for_bit():
    adapter, W = attached(VeRA(rank=3), (12, 9), stirred=False).adapters["0"], weight64()
    assert torch.equal(adapter.weight(W), W)
    assert torch.equal(adapter.d, torch.full((3,), 0.1).double())
    assert not adapter.b.any()


@pytest.mark.parametrize("rank", [2, 4, 30])
def test_the_formula(rank):
    """Whatever the form in which it is computed; the rank may exceed both sides."""
    adapters, W = attached(VeRA(rank), (12, 9), (5, 20)), weight64()
    adapter, bases = adapters.adapters["0"], adapters.shared
    expected = W + torch.diag(adapter.b) @ bases.B[:12] @ torch.diag(adapter.d) @ bases.A[:, :9]
    torch.testing.assert_close(adapter.weight(W), expected, rtol=0, atol=1e-11)


def test_gradients_by_hand():
    """dL/db = rows of G . (B D A), dL/dd_k = (b * B_k)^T G A_k^T."""
    adapters, W, G = attached(VeRA(rank=4), (12, 9)), weight64(), weight64()
    adapter, A, B = adapters.adapters["0"], adapters.shared.A, adapters.shared.B
    found = gradients(adapter, W, G)
    b, d = adapter.b.detach(), adapter.d.detach()
    torch.testing.assert_close(found["b"], (G * (B * d @ A)).sum(1), rtol=0, atol=1e-11)
    torch.testing.assert_close(found["d"], torch.stack([(b * B[:, k]) @ G @ A[k] for k in range(4)]), rtol=0, atol=1e-11)


def test_at_the_start_only_b_has_a_gradient():
    adapter = attached(VeRA(rank=4), (12, 9), stirred=False).adapters["0"]
    found = gradients(adapter, weight64(), weight64())
    assert found["b"].any() and not found["d"].any()


def test_all_layers_read_one_pair():
    """As wide as the widest, as tall as the tallest; layers of one shape, and parts of other ones, have equal bases."""
    adapters = attached(VeRA(rank=3), (12, 9), (12, 9), (5, 20))
    assert adapters.shared.A.shape == (3, 20) and adapters.shared.B.shape == (12, 3)
    one, two, three = adapters.adapters.values()
    assert one.shared is two.shared is three.shared is adapters.shared
    with torch.no_grad():
        for adapter in (one, two, three):
            adapter.b.fill_(1.0), adapter.d.fill_(1.0)
    first, second = delta(one, weight64()), delta(two, weight64())
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    torch.testing.assert_close(delta(three, weight64(5, 20))[:, :9], first[:5], rtol=0, atol=1e-12)


def test_a_deep_copy_has_one_pair_of_its_own():
    adapters = attached(VeRA(rank=3), (12, 9), (5, 20))
    twin = copy.deepcopy(adapters)
    assert twin.shared is not adapters.shared
    assert all(adapter.shared is twin.shared for adapter in twin.adapters.values())


def test_entries_of_the_pair():
    """Uniform with variance 2 / fan-in: bounds sqrt(6 / n) and sqrt(6 / r)."""
    bases = attached(VeRA(rank=64), (200, 300)).shared
    for tensor, fan_in in ((bases.A, 300), (bases.B, 64)):
        bound = (6 / fan_in) ** 0.5
        assert 0.99 * bound < tensor.abs().max() <= bound * (1 + 1e-6)
        assert abs(float(tensor.var()) * fan_in / 2 - 1) < 0.03


def test_the_seed_decides_the_pair():
    one, again, other = (attached(VeRA(rank=3), (12, 9), seed=seed).shared.A for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_rank_of_the_change():
    adapter = attached(VeRA(rank=3), (12, 9)).adapters["0"]
    assert torch.linalg.matrix_rank(delta(adapter, weight64())) == 3


@pytest.mark.parametrize("rank, dropout, factored", [(5, 0.0, True), (6, 0.0, False), (6, 0.1, True)])
def test_factored_while_the_rank_is_small_or_inputs_are_dropped(rank, dropout, factored):
    W = weight64()
    adapter = attached(VeRA(rank, dropout=dropout), (12, 9)).adapters["0"]
    form = adapter.factored(W)
    assert (form is not None) == factored
    if factored:
        assert form.dropout == dropout and not form.A.requires_grad
        torch.testing.assert_close(W + form.B @ form.A, adapter.weight(W), rtol=0, atol=1e-11)


def test_only_the_vectors_are_saved():
    state = attached(VeRA(rank=3), (12, 9)).state_dict()
    assert set(state) == {"adapters.0.b", "adapters.0.d", "shared.fingerprint"}
    assert state["shared.fingerprint"].dtype == torch.float32


def test_against_the_layer_of_peft():
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(7, 5))
    adapters = attach(network, VeRA(rank=3), "all")
    adapter = adapters.adapters["0"]
    with torch.no_grad():
        adapter.b.normal_(), adapter.d.normal_()
    twin = nn.Sequential(nn.Linear(7, 5))
    twin.load_state_dict(network.state_dict())
    twin = peft.get_peft_model(twin, peft.VeraConfig(r=3, target_modules=["0"]))
    layer = twin.base_model.model[0]
    assert layer.vera_A["default"].shape == adapters.shared.A.shape
    assert layer.vera_A["default"].abs().max() <= (6 / 7) ** 0.5
    for theirs, own in ((layer.vera_A, adapters.shared.A), (layer.vera_B, adapters.shared.B)):
        theirs["default"].data.copy_(own)
    layer.vera_lambda_b["default"].data.copy_(adapter.b)
    layer.vera_lambda_d["default"].data.copy_(adapter.d)
    x = torch.randn(4, 7)
    ours, theirs = network(x), twin(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours.square().sum().backward(), theirs.square().sum().backward()
    torch.testing.assert_close(adapter.b.grad, layer.vera_lambda_b["default"].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.d.grad, layer.vera_lambda_d["default"].grad, rtol=1e-4, atol=1e-4)


def test_counts():
    """768 x 768 at r = 8: 776; at r = 256: 1,024."""
    assert VeRA(rank=8).count(site(768, 768)) == 776
    assert VeRA().count(site(768, 768)) == 1_024
    assert VeRA(rank=3).count(site(4, 2, 3, 3)) == 7


# the bases are drawn again on load, and checked


def network():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))


def saved(folder):
    own = network()
    adapters = attach(own, VeRA(rank=3), "all", seed=3)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    return own, save_adapter(folder, own, seed=3)


def test_a_file_without_bases_gives_the_same_network(tmp_path):
    own, folder = saved(tmp_path / "adapter")
    load_adapter(fresh := network(), folder)
    x = torch.randn(4, 7)
    assert torch.equal(fresh(x), own(x))


@pytest.mark.parametrize("place", range(14))
def test_another_fingerprint_is_refused(tmp_path, place):
    """As if another version of the generator had drawn other bases: one line, and the network is as it was."""
    _, folder = saved(tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["shared.fingerprint"][place] += 0.01
    save_file(tensors, file)
    fresh, x = network(), torch.randn(4, 7)
    before = fresh(x)
    with pytest.raises(UserError, match="shared bases: the basis recomputed on load is not the one") as caught:
        load_adapter(fresh, folder)
    assert "\n" not in str(caught.value)
    assert torch.equal(fresh(x), before)


@pytest.mark.parametrize(
    "options, message", [({"rank": 0}, "rank: 0 is not positive"), ({"rank": -2}, "rank: -2"), ({"dropout": 1.0}, "dropout: 1.0")]
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=f"adapter.method.{message}"):
        VeRA(**options)
