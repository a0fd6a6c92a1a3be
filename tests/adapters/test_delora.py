"""DeLoRA: unit pairs, a bound that holds, and a start that is subtracted."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.delora import DeLoRA
from vision_peft.engine.install import attach
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError

CLOSE = {"rtol": 0, "atol": 1e-10}


def change(adapter, W):
    """D, pair by pair."""
    rank = adapter.A.shape[0]
    pairs = sum(torch.outer(b / b.norm(), a / a.norm()) for b, a in zip(adapter.B.mT, adapter.A))
    return (adapter.strength / rank * pairs * W.norm(dim=0)).detach()


def test_starts_at_the_identity():
    W = weight64()
    adapter = started(DeLoRA(rank=3), W)
    torch.testing.assert_close(adapter.weight(W), W, rtol=0, atol=1e-13)
    assert adapter.B.any()
    assert change(adapter, W).abs().max() > 0.1


def test_the_formula():
    W = weight64()
    start, adapter = started(DeLoRA(rank=3, strength=2.0), W), moved(DeLoRA(rank=3, strength=2.0), W)
    torch.testing.assert_close(delta(adapter, W), change(adapter, W) - change(start, W), **CLOSE)
    assert torch.linalg.matrix_rank(delta(adapter, W)) == 6


def test_the_lengths_of_the_factors_do_not_matter():
    W = weight64()
    adapter = moved(DeLoRA(rank=3), W)
    before = delta(adapter, W)
    with torch.no_grad():
        adapter.A.mul_(torch.tensor([[2.0], [30.0], [0.1]]))
        adapter.B.mul_(torch.tensor([0.5, 7.0, 40.0]))
    torch.testing.assert_close(delta(adapter, W), before, rtol=0, atol=1e-10)


def test_the_strength_bounds_the_change():
    W = weight64()
    for seed in range(5):
        torch.manual_seed(seed)
        adapter = moved(DeLoRA(rank=3, strength=2.0), W)
        with torch.no_grad():
            adapter.A.mul_(100)
        assert (change(adapter, W) / W.norm(dim=0)).norm() <= adapter.strength.abs() + 1e-9


def test_gradients_are_at_right_angles_to_the_factors():
    """Only angles can turn; the gradient of lambda is <G, D> / lambda."""
    W, G = weight64(), weight64()
    adapter = moved(DeLoRA(rank=3), W)
    found = gradients(adapter, W, G)
    assert (found["A"] * adapter.A).sum(1).abs().max() < 1e-9
    assert (found["B"] * adapter.B).sum(0).abs().max() < 1e-9
    assert found["A"].abs().max() > 1e-3
    expected = (G * change(adapter, W)).sum() / adapter.strength
    torch.testing.assert_close(found["strength"], expected, rtol=1e-9, atol=1e-10)


def test_with_all_lengths_equal_it_is_a_lora_with_weighted_columns():
    W = weight64()
    adapter = moved(DeLoRA(rank=3, strength=2.0), W)
    with torch.no_grad():
        adapter.A.copy_(adapter.A / adapter.A.norm(dim=1, keepdim=True) * 2)
        adapter.B.copy_(adapter.B / adapter.B.norm(dim=0) * 5)
    ours = delta(adapter, W) + change(started(DeLoRA(rank=3, strength=2.0), W), W)
    torch.testing.assert_close(ours, (adapter.strength / 30 * adapter.B @ adapter.A * W.norm(dim=0)).detach(), **CLOSE)


def test_a_pair_that_vanishes_stays_finite():
    W, G = weight64(), weight64()
    adapter = moved(DeLoRA(rank=3), W)
    with torch.no_grad():
        adapter.B[:, 1] = 0
        adapter.A[2] = 0
    found = gradients(adapter, W, G)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert adapter.weight(W).isfinite().all()


def test_a_column_of_zeros_stays_zero():
    W = weight64()
    W[:, 4] = 0
    assert not delta(moved(DeLoRA(rank=3), W), W)[:, 4].any()


def test_the_start_is_pinned_and_not_stored(tmp_path):
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(9, 12))
    bare = nn.Sequential(nn.Linear(9, 12))
    bare.load_state_dict(network.state_dict())
    adapters = attach(network, DeLoRA(rank=2), "all", seed=7)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert {key.rpartition(".")[2] for key in adapters.state_dict()} == {"A", "B", "strength", "fingerprint"}
    save_adapter(tmp_path / "adapter", network, seed=7)
    load_adapter(bare, tmp_path / "adapter")
    assert torch.equal(bare(torch.ones(2, 9)), network(torch.ones(2, 9)))
    other = attach(nn.Sequential(nn.Linear(9, 12)), DeLoRA(rank=2), "all", seed=8)
    with pytest.raises(UserError, match="basis"):
        other.load_state_dict(adapters.state_dict())


def test_against_the_layer_of_peft():
    peft = pytest.importorskip("peft")
    W = torch.randn(5, 7)
    adapter = moved(DeLoRA(rank=2, strength=3.0), W)
    network = nn.Sequential(nn.Linear(7, 5))
    network[0].weight.data.copy_(W)
    layer = peft.get_peft_model(network, peft.DeloraConfig(r=2, delora_lambda=3, target_modules=["0"])).base_model.model[0]
    start = change(started(DeLoRA(rank=2, strength=3.0), W), W)
    with torch.no_grad():
        layer.delora_A["default"].copy_(adapter.A)
        layer.delora_B["default"].copy_(adapter.B)
        layer.delora_lambda["default"].copy_(adapter.strength)
    torch.testing.assert_close(delta(adapter, W) + start, layer.get_delta_weight("default").detach(), rtol=1e-4, atol=1e-5)


def test_counts():
    """12,289 for 768 x 768 at r = 8: LoRA and one number."""
    assert DeLoRA(rank=8).count(site(768, 768)) == 12_289
    assert count(DeLoRA(rank=2), clip_vit_b16()) == 184_320 + 72
    assert trainables(DeLoRA(rank=3), site(4, 2, 3, 3)) == DeLoRA(rank=3).count(site(4, 2, 3, 3)) == 67


@pytest.mark.parametrize(
    "options, message",
    [({"rank": 0}, "rank: 0"), ({"strength": 0.0}, "strength: 0.0 is not positive"), ({"strength": -1.0}, "strength: -1.0")],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        DeLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        DeLoRA(rank=10).adapter(site(12, 9), None)
