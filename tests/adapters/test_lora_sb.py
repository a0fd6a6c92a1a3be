"""LoRA-SB: starts as the best low-rank form of one step of full fine-tuning, and trains inside its subspace."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, site, trainables, weight64
from torch import nn

from vision_peft.adapters.lora_sb import LoRASB
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.evidence import collect
from vision_peft.engine.install import adapters_off, attach
from vision_peft.engine.site import enumerate_sites
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError


def started(method, W, g):
    adapter = method.adapter(site(*W.shape), None).to(W.dtype)
    with torch.no_grad():
        adapter.initialize(W, Evidence(torch.Generator(), gradient=g))
    return adapter


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10)])
def test_the_start_is_the_best_approximation_of_the_first_step(shape):
    W, g = weight64(*shape), weight64(*shape)
    adapter = started(LoRASB(rank=4, eta=0.01), W, g)
    U, S, Vh = torch.linalg.svd(-0.01 * g.sign(), full_matrices=False)
    torch.testing.assert_close(delta(adapter, W), U[:, :4] * S[:4] @ Vh[:4], rtol=0, atol=1e-12)
    assert (delta(adapter, W) * g).sum() < 0, "the step must go down"
    assert not LoRASB.identity_at_init


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_full_rank_is_the_whole_step(shape):
    """Every entry moves by eta against the sign of its gradient, or not at all where that is zero."""
    W, g = weight64(*shape), weight64(*shape)
    g[3] = 0
    D = delta(started(LoRASB(rank=9, eta=0.01), W, g), W)
    torch.testing.assert_close(D, -0.01 * g.sign(), rtol=0, atol=1e-12)


def test_only_the_signs_of_the_gradient_matter():
    W, g = weight64(), weight64()
    one, two = (started(LoRASB(rank=4), W, gradient) for gradient in (g, g * torch.rand_like(g) * 1e-3))
    torch.testing.assert_close(delta(one, W), delta(two, W), rtol=0, atol=1e-15)


def test_the_frozen_factors_are_orthonormal_in_float32():
    """To 1e-6, which is what makes a scale superfluous; R starts as the singular values."""
    g = torch.randn(200, 150)
    adapter = started(LoRASB(rank=32), torch.randn(200, 150), g)
    for gram in (adapter.A @ adapter.A.mT, adapter.B.mT @ adapter.B):
        torch.testing.assert_close(gram, torch.eye(32), rtol=0, atol=1e-6)
    torch.testing.assert_close(adapter.R.detach(), torch.diag(torch.linalg.svdvals(1e-4 * g.sign())[:32]), rtol=1e-4, atol=1e-8)
    assert adapter.R.norm() <= 1e-4 * (200 * 150) ** 0.5


def test_gradient_by_hand():
    """dL/dR = B^T G A^T; A and B have none."""
    W, G = weight64(), weight64()
    adapter = started(LoRASB(rank=4), W, weight64())
    found = gradients(adapter, W, G)
    assert set(found) == {"R"}
    torch.testing.assert_close(found["R"], adapter.B.mT @ G @ adapter.A.mT, rtol=0, atol=1e-12)


def test_a_step_on_R_moves_the_weight_by_the_projected_gradient():
    """-eps B B^T G A^T A, so the loss falls by eps |B^T G A^T|^2 to first order."""
    W, G = weight64(), weight64()
    adapter = started(LoRASB(rank=4), W, weight64())
    before, found = delta(adapter, W), gradients(adapter, W, G)["R"]
    with torch.no_grad():
        adapter.R.sub_(1e-3 * found)
    moved = delta(adapter, W) - before
    P, Q = adapter.B @ adapter.B.mT, adapter.A.mT @ adapter.A
    torch.testing.assert_close(moved, -1e-3 * P @ G @ Q, rtol=0, atol=1e-14)
    torch.testing.assert_close((moved * G).sum(), -1e-3 * found.square().sum(), rtol=1e-10, atol=0)


def test_without_any_gradient_it_is_at_rest_in_the_basis_of_the_weight():
    W = weight64()
    adapter = started(LoRASB(rank=4), W, torch.zeros_like(W))
    assert torch.equal(adapter.weight(W), W)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(adapter.B @ adapter.B.mT, U[:, :4] @ U[:, :4].mT, rtol=0, atol=1e-11)
    torch.testing.assert_close(adapter.A.mT @ adapter.A, Vh[:4].mT @ Vh[:4], rtol=0, atol=1e-11)
    assert gradients(adapter, W, weight64())["R"].any()


def prepared():
    """A network, its batches and a loss, with adapters of full rank from evidence."""
    network = nn.Sequential(nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 5))
    batches = [(torch.randn(16, 9), torch.randn(16, 5)) for _ in range(3)]
    return network, batches, lambda batch: (network(batch[0]) - batch[1]).square().mean()


def test_at_full_rank_the_adapted_network_is_the_one_after_a_sign_step():
    """Through the engine: evidence over three batches, attach, and off again."""
    network, batches, loss = prepared()
    sites = [each for each in enumerate_sites(network) if each.name == "0"]
    x = torch.randn(4, 9)
    frozen, W = network(x), network[0].weight.detach().clone()
    mean = torch.stack([torch.autograd.grad(loss(batch), network[0].weight)[0] for batch in batches]).mean(0)
    stepped = torch.nn.functional.linear(x, W - 0.01 * mean.sign(), network[0].bias)
    attach(network, LoRASB(rank=8, eta=0.01), "0", evidence=collect(network, sites, ("gradient",), batches, loss))
    torch.testing.assert_close(network[0](x), stepped, rtol=1e-4, atol=1e-5)
    assert torch.equal(network[0].weight, W), "nothing is subtracted from the frozen weight"
    with adapters_off(network):
        assert torch.equal(network(x), frozen)


def test_without_evidence_it_is_refused():
    with pytest.raises(UserError, match=r"lora_sb needs evidence \(gradient\)"):
        attach(prepared()[0], LoRASB(rank=3), "0")


def test_a_file_holds_the_basis_and_needs_no_evidence(tmp_path):
    network, batches, loss = prepared()
    sites = [each for each in enumerate_sites(network) if each.role == "weight"]
    adapters = attach(network, LoRASB(rank=3), "all", evidence=collect(network, sites, ("gradient",), batches, loss))
    assert set(adapters.adapters["0"].state_dict()) == {"R", "A", "B"}
    folder = save_adapter(tmp_path / "adapter", network)
    fresh, x = nn.Sequential(nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 5)), torch.randn(4, 9)
    fresh.load_state_dict(network.state_dict())
    load_adapter(fresh, folder)
    assert torch.equal(fresh(x), network(x))


def test_counts():
    """1,024 at r = 32, 9,216 at r = 96; six matrices in the 24 blocks of CLIP ViT-B's towers: 147,456."""
    assert LoRASB().count(site(768, 768)) == 1_024
    assert LoRASB(rank=96).count(site(4096, 4096)) == 9_216
    assert 24 * 6 * LoRASB().count(site(768, 768)) == 147_456
    assert trainables(LoRASB(rank=3), site(4, 2, 3, 3)) == LoRASB(rank=3).count(site(4, 2, 3, 3)) == 9


@pytest.mark.parametrize(
    "options, message",
    [({"rank": 0}, "rank: 0 is not positive"), ({"eta": 0.0}, "eta: 0.0 is not positive"), ({"dropout": 1.0}, "dropout: 1.0")],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=f"adapter.method.{message}"):
        LoRASB(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        LoRASB(rank=10).adapter(site(12, 9), None)
