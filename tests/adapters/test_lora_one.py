"""LoRA-One: the start is a step of spectral descent."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, site, trainables, weight64
from torch import nn

from vision_peft.adapters.lora_one import LoRAOne
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.evidence import collect
from vision_peft.engine.install import attach
from vision_peft.engine.site import enumerate_sites
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def started(method, W, G):
    adapter = method.adapter(site(*W.shape), None).to(W.dtype)
    with torch.no_grad():
        adapter.initialize(W, Evidence(torch.Generator().manual_seed(0), gradient=G))
    return adapter


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_the_start_is_the_best_approximation_of_the_negative_gradient(shape):
    W, G = weight64(*shape), weight64(*shape)
    adapter = started(LoRAOne(rank=3, alpha=6.0, scaling="rank", gamma=50.0), W, G)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(delta(adapter, W), -2 / (50 * S[0]) * (U[:, :3] * S[:3] @ Vh[:3]), **EXACT)


def test_the_factors_share_the_values_evenly():
    W, G = weight64(), weight64()
    adapter = started(LoRAOne(rank=3, gamma=50.0), W, G)
    S = torch.linalg.svdvals(G)[:3]
    torch.testing.assert_close(adapter.B.mT @ adapter.B, torch.diag(S / S[0] / 50), **EXACT)
    torch.testing.assert_close(adapter.A @ adapter.A.mT, torch.diag(S / S[0] / 50), **EXACT)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_the_step_is_as_long_whatever_the_size_of_the_gradient(size):
    W, G = weight64(), weight64()
    adapter = started(LoRAOne(rank=3), W, size * G)
    assert float(torch.linalg.norm(delta(adapter, W), 2)) == pytest.approx(16 / 3**0.5 / 128, rel=1e-9)


def test_the_step_goes_down():
    W, G = weight64(), weight64()
    adapter = started(LoRAOne(rank=3), W, G)
    S = torch.linalg.svdvals(G)
    slope = (delta(adapter, W) * G).sum()
    torch.testing.assert_close(slope, -adapter.scale / (128 * S[0]) * S[:3].square().sum(), **EXACT)


def test_the_loss_of_a_network_falls_by_the_start_alone():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    x, target = torch.randn(64, 9), torch.randn(64, 4)

    def loss(_):
        return (network(x) - target).square().mean()

    before = float(loss(None).detach())
    method = LoRAOne(rank=2)
    evidence = collect(network, enumerate_sites(network)[::2], method.evidence, [None], loss)
    attach(network, method, "all", evidence=evidence)
    assert float(loss(None).detach()) < before - 1e-3


def test_with_the_offset_it_starts_at_the_identity_with_the_same_directions():
    W, G = torch.randn(12, 9), torch.randn(12, 9)
    method = LoRAOne(rank=3, offset=True)
    adapter = started(method, W, G)
    torch.testing.assert_close(adapter.weight(W), W, rtol=0, atol=1e-6)
    assert torch.equal(adapter.A, started(LoRAOne(rank=3), W, G).A)
    assert (method.identity_at_init, LoRAOne().identity_at_init) == (True, False)


@pytest.mark.parametrize("offset", [False, True])
def test_the_formula_after_training(offset):
    W, G = weight64(), weight64()
    adapter = started(LoRAOne(rank=3, alpha=6.0, scaling="rank", offset=offset), W, G)
    start = (adapter.B @ adapter.A).detach() if offset else 0
    with torch.no_grad():
        adapter.A.normal_(), adapter.B.normal_()
    torch.testing.assert_close(delta(adapter, W), 2 * ((adapter.B @ adapter.A).detach() - start), **EXACT)


def test_gradients_at_the_start():
    W, G = weight64(), weight64()
    adapter = started(LoRAOne(rank=3), W, G)
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], adapter.scale * G @ adapter.A.mT, **EXACT)
    torch.testing.assert_close(found["A"], adapter.scale * adapter.B.mT @ G, **EXACT)


def test_a_gradient_of_zero_gives_loras_start():
    W = torch.randn(12, 9)
    adapter = started(LoRAOne(rank=3), W, torch.zeros(12, 9))
    assert torch.equal(adapter.weight(W), W)
    assert adapter.A.abs().min() > 0
    assert not adapter.B.any()


@pytest.mark.parametrize("offset, keys", [(False, {"A", "B"}), (True, {"A", "B", "A0", "B0"})])
def test_what_is_saved_and_restored(offset, keys):
    W, G = torch.randn(12, 9), torch.randn(12, 9)
    adapter = started(LoRAOne(rank=3, offset=offset), W, G)
    assert set(adapter.state_dict()) == keys
    other = started(LoRAOne(rank=3, offset=offset), W, None)
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other.weight(W), adapter.weight(W))
    assert adapter.fingerprint() is None


def test_counts():
    assert LoRAOne().count(site(768, 768)) == 12_288
    assert trainables(LoRAOne(rank=3), site(4, 2, 3, 3)) == LoRAOne(rank=3).count(site(4, 2, 3, 3)) == 66


@pytest.mark.parametrize(
    "options, message",
    [({"gamma": 0.0}, "gamma: 0.0 is not"), ({"rank": 0}, "rank: 0"), ({"scaling": "x"}, "scaling"), ({"dropout": 1.0}, "dropout")],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LoRAOne(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        LoRAOne(rank=10).adapter(site(12, 9), None)
