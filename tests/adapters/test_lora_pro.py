"""LoRA-Pro: the equivalent gradient is the projection it claims to be, whatever X, and X is the nearest."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.lora_pro import LoRAPro
from vision_peft.engine.adapter import Clock
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # the 1e-8 I in the inverses


class Case:
    """An adapter with its gradients before (g) and after (h), and the dense gradient."""

    def __init__(self, method=None, shape=(12, 9), adapter=None):
        method = method or LoRAPro(rank=3, alpha=6.0)
        self.W, self.G = weight64(*shape), weight64(*shape)
        self.adapter = adapter(method, self.W) if adapter else moved(method, self.W)
        self.A, self.B, self.s = self.adapter.A.detach(), self.adapter.B.detach(), self.adapter.scale
        found = gradients(self.adapter, self.W, self.G)
        self.g_A, self.g_B = found["A"].clone(), found["B"].clone()
        with torch.no_grad():
            method.adjust_gradients({"one": self.adapter}, None, Clock(0, 1, 0))
        self.h_A, self.h_B = self.adapter.A.grad, self.adapter.B.grad

    @property
    def equivalent(self):
        return self.s * (self.B @ self.h_A + self.h_B @ self.A)

    def without_x(self):
        gram = torch.linalg.inv(self.B.mT @ self.B)
        h_A = gram @ self.g_A / self.s**2
        h_B = (self.g_B - self.B @ gram @ self.B.mT @ self.g_B) @ torch.linalg.inv(self.A @ self.A.mT) / self.s**2
        return h_A, h_B


def projector(columns):
    Q, _ = torch.linalg.qr(columns)
    return Q @ Q.mT


def test_starts_at_the_identity_with_the_factors_of_lora():
    W = torch.randn(12, 9)
    adapter = started(LoRAPro(rank=3), W)
    assert torch.equal(adapter.weight(W), W)
    assert torch.equal(adapter.A, started(LoRA(rank=3), W).A)


def test_the_formula_of_the_map():
    W = weight64()
    adapter = moved(LoRAPro(rank=3, alpha=2.0), W)
    torch.testing.assert_close(delta(adapter, W), 2 / 3 * (adapter.B @ adapter.A).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (4, 9)])
@pytest.mark.parametrize("alpha", [0.5, 6.0])
def test_the_equivalent_gradient_is_two_projections(shape, alpha):
    case = Case(LoRAPro(rank=3, alpha=alpha), shape)
    P_B, P_A = projector(case.B), projector(case.A.mT)
    torch.testing.assert_close(case.equivalent, P_B @ case.G + case.G @ P_A - P_B @ case.G @ P_A, **CLOSE)


def test_no_pair_of_factor_steps_comes_closer():
    """Least squares over all (h_A, h_B), as one dense system: an oracle that knows no formula."""
    case = Case()
    out, inner = torch.eye(12).double(), torch.eye(9).double()
    system = case.s * torch.cat([torch.kron(case.B, inner), torch.kron(out, case.A.mT.contiguous())], 1)  # row-major vec
    best = torch.linalg.lstsq(system, case.G.reshape(-1, 1), driver="gelsd").solution
    torch.testing.assert_close(case.equivalent, (system @ best).view(12, 9), **CLOSE)


def test_x_drops_out_of_the_equivalent_gradient():
    case = Case()
    h_A, h_B = case.without_x()
    assert (case.h_A - h_A).abs().max() > 1e-2
    torch.testing.assert_close(case.s * (case.B @ h_A + h_B @ case.A), case.equivalent, **CLOSE)


def test_x_solves_sylvesters_equation():
    case = Case()
    h_A, h_B = case.without_x()
    X = (case.h_A - h_A) @ torch.linalg.pinv(case.A)
    torch.testing.assert_close(X @ case.A, case.h_A - h_A, **CLOSE)
    torch.testing.assert_close(-case.B @ X, case.h_B - h_B, **CLOSE)
    gram = case.B.mT @ case.B
    torch.testing.assert_close(gram @ X + X @ case.A @ case.A.mT, -torch.linalg.inv(gram) @ case.g_A @ case.A.mT / case.s**2, **CLOSE)


def test_no_other_x_leaves_the_factor_gradients_closer_to_their_own():
    case = Case()

    def distance(X):
        return (case.h_A + X @ case.A - case.g_A).square().sum() + (case.h_B - case.B @ X - case.g_B).square().sum()

    for _ in range(20):
        assert distance(0.1 * torch.randn(3, 3).double()) > distance(torch.zeros(3, 3).double())


def test_at_least_as_close_as_lora_and_downhill():
    case = Case()
    lora = case.s**2 * (case.B @ case.B.mT @ case.G + case.G @ case.A.mT @ case.A)
    assert (case.equivalent - case.G).norm() <= (lora - case.G).norm()
    assert (case.equivalent - case.G).norm() < case.G.norm()
    assert float((case.G * case.equivalent).sum()) > 0
    assert torch.linalg.matrix_rank(case.equivalent, rtol=1e-6) == 6  # 2 r


def test_the_equivalent_gradient_does_not_depend_on_the_scale():
    W, G, found = weight64(), weight64(), []
    for alpha in (1.0, 20.0):
        method = LoRAPro(rank=3, alpha=alpha)
        adapter = started(method, W)
        with torch.no_grad():
            adapter.B.copy_(torch.arange(36.0).view(12, 3).cos())
        gradients(adapter, W, G)
        with torch.no_grad():
            method.adjust_gradients({"one": adapter}, None, Clock(0, 1, 0))
            found.append(adapter.scale * (adapter.B @ adapter.A.grad + adapter.B.grad @ adapter.A))
    torch.testing.assert_close(*found, **CLOSE)


def test_at_full_rank_it_is_the_dense_gradient():
    case = Case(LoRAPro(rank=9))
    torch.testing.assert_close(case.equivalent, case.G, rtol=1e-3, atol=1e-4)


def test_the_first_step_moves_b_alone():
    case = Case(adapter=started)
    assert not case.h_A.any()
    torch.testing.assert_close(case.h_B, case.g_B @ torch.linalg.inv(case.A @ case.A.mT) / case.s**2, **CLOSE)


def test_a_dead_direction_of_b_gives_finite_gradients():
    def lame(method, W):
        adapter = moved(method, W)
        with torch.no_grad():
            adapter.B[:, 1] = adapter.B[:, 0]
            adapter.A[2] = 0
        return adapter

    case = Case(adapter=lame)
    assert case.h_A.isfinite().all() and case.h_B.isfinite().all()
    P_B, P_A = projector(case.B[:, [0, 2]]), projector(case.A[:2].mT)
    torch.testing.assert_close(case.equivalent, P_B @ case.G + case.G @ P_A - P_B @ case.G @ P_A, rtol=1e-4, atol=1e-4)


def test_gradient_descent_follows_full_fine_tuning():
    """At full rank a small SGD step changes the weight as one of the dense weight does."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 8, bias=False))
    method = LoRAPro(rank=6)
    adapters = attach(network, method, "all")
    adapter, W = adapters.adapters["0"], network[0].weight.detach()
    with torch.no_grad():
        adapter.B.normal_()
    x, target = torch.randn(32, 6), torch.randn(32, 8)
    before = adapter.weight(W).detach().requires_grad_()
    (x @ before.mT - target).square().mean().backward()
    optimizer = torch.optim.SGD(adapters.parameters(), lr=1e-3)
    (network(x) - target).square().mean().backward()
    adapters.adjust_gradients(Clock(0, 1, 0, optimizer))
    optimizer.step()
    torch.testing.assert_close(adapter.weight(W) - before, -1e-3 * before.grad, rtol=1e-2, atol=2e-6)


def test_it_trains_with_adam():
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    adapters = attach(network, LoRAPro(rank=2), "all")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    x, target, losses = torch.randn(32, 9), torch.randn(32, 4), []
    for step in range(40):
        optimizer.zero_grad()
        loss = (network(x) - target).square().mean()
        loss.backward()
        adapters.adjust_gradients(Clock(step, 40, 0, optimizer))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_counts():
    """As LoRA: 12,288 for 768 x 768 at r = 8."""
    assert LoRAPro(rank=8).count(site(768, 768)) == 12_288
    assert count(LoRAPro(rank=2), clip_vit_b16()) == 184_320
    assert trainables(LoRAPro(rank=3), site(4, 2, 3, 3)) == LoRAPro(rank=3).count(site(4, 2, 3, 3)) == 66


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 0.0}, "alpha: 0.0 is not positive"),
        ({"rank": 0}, "rank: 0"),
        ({"scaling": "no"}, "scaling: 'no'"),
        ({"dropout": 1.0}, "dropout: 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LoRAPro(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        LoRAPro(rank=10).adapter(site(12, 9), None)
