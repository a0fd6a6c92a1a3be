"""Bayesian-LoRA: the quantised product, gates by the numbers of the note, the penalty, and the three phases of a run."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.bayesian_lora import BayesianLoRA, bit_operations
from vision_peft.adapters.lora import LoRA
from vision_peft.engine.adapter import Clock
from vision_peft.engine.install import attach
from vision_peft.engine.merged import effective_state
from vision_peft.errors import UserError
from vision_peft.linalg.gates import sample_gates

EXACT = {"rtol": 0, "atol": 1e-12}


def trained(method: BayesianLoRA, W: torch.Tensor, bits=None, ranks=None):
    """Factors off their start, gates as given: phi of 6 for 1, of -6 for 0."""
    adapter = started(method, W)
    with torch.no_grad():
        adapter.B.normal_(), adapter.e.normal_(), adapter.ranges.copy_(torch.tensor([0.3, 2.0]))
        if bits is not None:
            adapter.bit_gates.copy_(torch.tensor(bits) * 12.0 - 6)
        if ranks is not None:
            adapter.rank_gates.copy_(torch.tensor(ranks) * 12.0 - 6)
    return adapter


def uniform(x: torch.Tensor, limit: float, bits: int) -> torch.Tensor:
    step = 2 * limit / (2**bits - 1)
    return step * (x.clamp(-limit * (1 - 1e-7), limit * (1 - 1e-7)) / step).round()


def stepped(adapters, method, optimizer, network, x, steps, total):
    for step in steps:
        optimizer.zero_grad()
        (network(x).square().mean() + adapters.penalty()).backward()
        adapters.adjust_gradients(Clock(step, total, 0, optimizer))
        optimizer.step()
        adapters.coordinate(Clock(step + 1, total, 0, optimizer))


def test_starts_at_the_identity_in_both_modes():
    W = torch.randn(12, 9)
    adapter = started(BayesianLoRA(rank=3), W)
    assert torch.equal(adapter.weight(W), W)
    assert torch.equal(adapter.train().weight(W), W)
    assert adapter.ranges.tolist() == pytest.approx([float(adapter.A.detach().abs().max()), 0.05])


@pytest.mark.parametrize("bits, widths", [([[1, 1, 1], [1, 0, 1]], (16, 4)), ([[0, 1, 1], [1, 1, 0]], (2, 8))])
@pytest.mark.parametrize("rank_gates, rho", [("nested", [1, 1, 0, 0]), ("independent", [1, 1, 0, 1]), ("none", [1, 1, 1, 1])])
def test_the_formula_in_evaluation(bits, widths, rank_gates, rho):
    """Plain quantisation with as many bits as gates are open in a row; ranks behind a closed gate are closed, if nested."""
    W = weight64()
    adapter = trained(BayesianLoRA(rank=4, alpha=8.0, rank_gates=rank_gates), W, bits, None if rank_gates == "none" else [1, 1, 0, 1])
    assert adapter.widths() == widths
    assert adapter.kept().tolist() == [k for k in range(4) if rho[k]]
    A, B = uniform(adapter.A, 0.3, widths[0]), uniform(adapter.B, 2.0, widths[1])
    expected = 2 * B @ torch.diag(adapter.e * torch.tensor(rho)) @ A
    torch.testing.assert_close(delta(adapter, W), expected.detach(), rtol=0, atol=1e-7)


def test_at_32_bits_with_all_open_it_is_lora():
    W = weight64()
    adapter = trained(BayesianLoRA(rank=3, alpha=3.0, max_bits=32), W, [[1] * 4] * 2, [1] * 3)
    lora = started(LoRA(rank=3, alpha=3.0), W)
    with torch.no_grad():
        adapter.ranges.copy_(torch.stack([adapter.A.abs().max(), adapter.B.abs().max()]))
        lora.A.copy_(adapter.A), lora.B.copy_(adapter.B), adapter.e.fill_(1.0)
    expected = delta(lora, W)  # the largest entry of either factor is clipped by a part in 1e7
    assert (delta(adapter, W) - expected).abs().max() < 2.5e-7 * expected.abs().max()


def test_all_ranks_closed_give_the_frozen_weight():
    W = weight64()
    adapter = trained(BayesianLoRA(rank=3), W, ranks=[0, 1, 1])
    assert torch.equal(adapter.weight(W), W)
    assert adapter.compact().A.shape == (0, 9)


def test_training_draws_what_the_formula_says():
    """The same draws by hand: for the bit gates of A and B first, then for the ranks."""
    W = weight64()
    adapter = trained(BayesianLoRA(rank=3, alpha=3.0), W).train()
    with torch.no_grad():
        adapter.bit_gates.fill_(0.2), adapter.rank_gates.fill_(0.5)
    torch.manual_seed(11)
    form = adapter.factored(W)
    torch.manual_seed(11)
    z, rho = sample_gates(adapter.bit_gates), sample_gates(adapter.rank_gates).cumprod(0)

    def quantised(x, limit, z):
        levels = [uniform(x, limit, bits) for bits in (2, 4, 8, 16)]
        return levels[0] + sum(z[: k + 1].prod() * (levels[k + 1] - levels[k]) for k in range(3))

    torch.testing.assert_close(form.A, quantised(adapter.A, 0.3, z[0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(form.B, adapter.e * rho * quantised(adapter.B, 2.0, z[1]), rtol=0, atol=1e-6)
    assert not torch.equal(adapter.factored(W).A, adapter.factored(W).A)
    adapter.eval()
    assert torch.equal(adapter.factored(W).A, adapter.factored(W).A)


def test_gradients_pass_straight_through_the_quantisers():
    W, G = weight64(), weight64()
    adapter = trained(BayesianLoRA(rank=3, alpha=6.0), W, [[1, 0, 0], [0, 0, 0]], [1, 1, 0])
    found = gradients(adapter, W, G)
    A, B, rho = uniform(adapter.A, 0.3, 4).detach(), uniform(adapter.B, 2.0, 2).detach(), torch.tensor([1, 1, 0])
    left, right = 2 * (adapter.e.detach() * rho)[:, None] * (B.mT @ G), 2 * (G @ A.mT) * (adapter.e.detach() * rho)
    torch.testing.assert_close(found["A"], torch.where(adapter.A.abs() < 0.3, left, 0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["B"], torch.where(adapter.B.abs() < 2.0, right, 0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["e"], 2 * rho * ((B.mT @ G) * A).sum(1), rtol=0, atol=1e-6)


def test_the_penalty_by_the_numbers_of_the_note():
    """phi = (1.0, 0.3, -0.5, 0.8): 3.90401; one weight, both factors alike, so the mean is that."""
    adapter = started(BayesianLoRA(rank=2, max_bits=32, bits=1.0, ranks=0.0, warm_up=0.0), weight64())
    with torch.no_grad():
        adapter.bit_gates.copy_(torch.tensor([1.0, 0.3, -0.5, 0.8]).expand(2, 4))
    assert float(adapter.penalty().detach()) == pytest.approx(3.90401, abs=1e-5)


def test_the_penalty_on_ranks_is_the_expected_rank():
    q = [0.93077, 0.86973, 0.75, 0.91672]
    for kind, expected in (("independent", sum(q)), ("nested", 2.90401), ("none", 0.0)):
        adapter = started(BayesianLoRA(rank=4, rank_gates=kind, bits=0.0, ranks=0.5, warm_up=0.0), weight64())
        if kind != "none":
            with torch.no_grad():
                adapter.rank_gates.copy_(torch.tensor([1.0, 0.3, -0.5, 0.8]))
        assert float(torch.as_tensor(adapter.penalty()).detach()) == pytest.approx(0.5 * expected, abs=1e-5)


def test_the_penalty_is_a_mean_over_factors_and_weights():
    network = nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 8), nn.Linear(8, 5))
    adapters = attach(network, BayesianLoRA(rank=2, bits=0.3, ranks=0.7, warm_up=0.0, phi=9.0), "all")
    assert float(adapters.penalty().detach()) == pytest.approx(0.3 * 4 + 0.7 * 2, rel=1e-3)
    costly = attach(network, BayesianLoRA(rank=2, bits=0.3, ranks=0.0, warm_up=0.0, phi=9.0, cost="bop"), "all", name="bop")
    sizes = [9, 12, 12, 8, 8, 5]  # A (r, n) and B (m, r) of each layer
    assert float(costly.penalty().detach()) == pytest.approx(0.3 * (2 + 4 + 8 + 16) * sum(sizes) / 12 / 6, rel=1e-3)


@pytest.mark.parametrize("cost", ["const", "bop"])
@pytest.mark.parametrize("rank_gates", ["nested", "independent"])
def test_the_penalty_falls_with_every_gate(cost, rank_gates):
    adapter = moved(BayesianLoRA(rank=3, cost=cost, rank_gates=rank_gates, phi=0.0, warm_up=0.0), weight64())
    adapter.penalty().backward()
    assert (adapter.bit_gates.grad > 0).all()
    assert (adapter.rank_gates.grad > 0).all()
    assert adapter.A.grad is None


def test_phases_of_a_run():
    """The penalty rises over the first 20 % and is gone in the last 30 %, where the gates stand still and are no longer drawn."""
    method = BayesianLoRA(rank=2, warm_up=0.2, settle=0.3, gate_lr=0.5, phi=0.0)
    network = nn.Sequential(nn.Linear(9, 12))
    adapters = attach(network, method, "all")
    adapter, optimizer = adapters.adapters["0"], torch.optim.AdamW(adapters.param_groups(1e-2), lr=1e-2)
    strengths, phis, x = [], [], torch.randn(16, 9)
    for step in range(20):
        strengths.append(float(adapter.strength))
        stepped(adapters, method, optimizer, network, x, [step], 20)
        phis.append(torch.cat([phi.detach().flatten().clone() for phi in adapter.gates()]))
    assert strengths == pytest.approx([0, 0.25, 0.5, 0.75] + [1.0] * 10 + [0.0] * 6)
    assert all(torch.equal(phi, phis[13]) for phi in phis[14:])
    assert not torch.equal(phis[13], phis[12])
    network.train()
    assert torch.equal(network(x), network(x))
    moving = adapter.B.detach().clone()
    stepped(adapters, method, optimizer, network, x, [18], 20)
    assert not torch.equal(adapter.B, moving)
    assert {"strength", "settled"} <= adapter.state_dict().keys()


def test_a_heavier_penalty_leaves_fewer_bits_and_ranks():
    shares = []
    for weight in (0.0, 0.03, 3.0):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 8))
        adapters = attach(network, BayesianLoRA(rank=4, bits=weight, ranks=weight, gate_lr=0.1, phi=2.0), "all")
        optimizer = torch.optim.AdamW(adapters.param_groups(1e-2), lr=1e-2)
        x, target = torch.randn(64, 9), torch.randn(64, 8)
        for step in range(80):
            optimizer.zero_grad()
            ((network(x) - target).square().mean() + adapters.penalty()).backward()
            adapters.adjust_gradients(Clock(step, 80, 0, optimizer))
            optimizer.step()
            adapters.coordinate(Clock(step + 1, 80, 0, optimizer))
        shares.append(bit_operations(adapters.named_adapters())["share"])
    assert shares[0] > shares[1] > shares[2]


def test_bit_operations_by_hand():
    adapter = trained(BayesianLoRA(rank=4), weight64(12, 9), [[1, 1, 0], [1, 0, 0]], [1, 1, 1, 0])
    found = bit_operations({"a": adapter})
    assert found["cost"] == 3 * (9 * 8 + 12 * 4) * 32
    assert found["reference"] == 4 * (9 + 12) * 1024
    assert found["share"] == found["cost"] / found["reference"]
    assert (found["rank"], found["bits"]) == (3, 6)
    assert bit_operations({"a": adapter}, input_bits=8)["cost"] == found["cost"] / 4


def test_groups():
    adapters = attach(nn.Sequential(nn.Linear(9, 12)), BayesianLoRA(rank=2, gate_lr=0.3, range_lr=0.2), "all")
    weights, gates, ranges = adapters.param_groups(1e-3)
    assert (gates["lr"], gates["weight_decay"]) == (0.3, 0.0) and (ranges["lr"], ranges["weight_decay"]) == (0.2, 0.0)
    assert [len(group["params"]) for group in (weights, gates, ranges)] == [3, 2, 1]
    assert {id(p) for group in (weights, gates, ranges) for p in group["params"]} == {id(p) for p in adapters.parameters()}


def test_compact_is_an_equal_lora():
    W = weight64()
    adapter = trained(BayesianLoRA(rank=4), W, [[1, 1, 0], [1, 0, 0]], [1, 1, 0, 1])
    small = adapter.compact()
    assert small.B.shape == (12, 2)
    torch.testing.assert_close(delta(small, W), delta(adapter, W), **EXACT)


def test_an_export_before_any_call_sees_evaluation_gates():
    network = nn.Sequential(nn.Linear(9, 12)).eval()
    adapter = attach(network, BayesianLoRA(rank=4, phi=0.0), "all").adapters["0"]
    with torch.no_grad():
        adapter.B.normal_()
    once, again = effective_state(network)["0.weight"], effective_state(network)["0.weight"]
    assert torch.equal(once, again)
    assert not torch.equal(once, network[0].weight)


def test_counts():
    """768 x 768, r = 8, gates for 4 to 32 bits: 12,314."""
    assert BayesianLoRA(max_bits=32).count(site(768, 768)) == 12_314
    for options in ({}, {"rank_gates": "none"}, {"max_bits": 4}):
        method = BayesianLoRA(rank=3, **options)
        assert trainables(method, site(4, 2, 3, 3)) == method.count(site(4, 2, 3, 3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: 0"),
        ({"max_bits": 2}, "max_bits: 2 is not one of 4, 8, 16, 32"),
        ({"rank_gates": "all"}, "rank_gates: 'all'"),
        ({"cost": "flops"}, "cost: 'flops'"),
        ({"bits": -1.0}, "method.bits: -1.0 is negative"),
        ({"ranks": -1.0}, "method.ranks: -1.0"),
        ({"warm_up": -0.1}, "warm_up: -0.1"),
        ({"warm_up": 0.5, "settle": 0.5}, "settle: 0.5"),
        ({"gate_lr": 0.0}, "gate_lr: 0.0"),
        ({"range_lr": 0.0}, "range_lr: 0.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        BayesianLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        BayesianLoRA(rank=10).adapter(site(12, 9), None)
