"""CoDyRA: the update as a sum over ranks, the thresholds of the paper's 500 steps, and which ranks survive them."""

from __future__ import annotations

import warnings

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.codyra import CoDyRA
from vision_peft.adapters.lora import LoRA
from vision_peft.engine.adapter import Clock
from vision_peft.engine.install import attach, merge
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def test_starts_at_the_identity_although_the_importances_are_random():
    W = torch.randn(12, 9)
    adapter = started(CoDyRA(rank=4), W)
    assert torch.equal(adapter.weight(W), W)
    assert adapter.gate.unique().numel() == 4


def test_the_formula():
    W = weight64()
    adapter = moved(CoDyRA(rank=4), W)
    terms = [adapter.gate[k] * torch.outer(adapter.B[:, k], adapter.A[k]) for k in range(4)]
    torch.testing.assert_close(delta(adapter, W), sum(terms).detach(), **EXACT)


def test_importances_of_one_give_lora_with_scale_1():
    W = weight64()
    ours, lora = moved(CoDyRA(rank=4), W), moved(LoRA(rank=4, alpha=4.0), W)
    with torch.no_grad():
        lora.A.copy_(ours.A), lora.B.copy_(ours.B), ours.gate.fill_(1.0)
    torch.testing.assert_close(ours.weight(W), lora.weight(W), **EXACT)


def test_gradients_by_hand():
    W, G = weight64(), weight64()
    adapter = moved(CoDyRA(rank=3), W)
    found = gradients(adapter, W, G)
    A, B, w = adapter.A.detach(), adapter.B.detach(), adapter.gate.detach()
    torch.testing.assert_close(found["gate"], ((B.mT @ G) * A).sum(1), **EXACT)
    torch.testing.assert_close(found["A"], w[:, None] * (B.mT @ G), **EXACT)
    torch.testing.assert_close(found["B"], w * (G @ A.mT), **EXACT)


@pytest.mark.parametrize(
    "t, kappa", [(0, 0), (249, 0), (250, 0), (251, 0.005 / 49), (254, 0.005 / 49), (255, 0.01 / 49), (490, 0.005), (499, 0.005)]
)
def test_thresholds_of_the_papers_run(t, kappa):
    """T = 500, D = 250, 50 levels of 5 steps; nothing is applied at t = D itself."""
    assert CoDyRA().threshold(t, 500) == pytest.approx(kappa, abs=1e-12)


def test_thresholds_of_a_whole_run_as_the_loop_of_the_note():
    short = CoDyRA(levels=10, kappa=0.04)
    for method, total in ((CoDyRA(), 500), (short, 60), (CoDyRA(levels=3, dense=0.3), 47), (CoDyRA(dense=0.0), 200)):
        dense, level, now = method.dense * total, 0, 0.0
        stride = int((total - dense) / method.levels)
        for t in range(total):
            if t >= dense and t % stride == 0:
                level += 1
                now = method.kappa * min(level, method.levels - 1) / (method.levels - 1)
            assert method.threshold(t, total) == pytest.approx(now if t > dense else 0.0, abs=1e-12)
    assert sum(CoDyRA().threshold(t, 500) for t in range(500)) == pytest.approx(0.64990, abs=5e-6)
    assert sum(CoDyRA(levels=10, kappa=0.036).threshold(t, 60) for t in range(60)) == pytest.approx(0.65, abs=0.01)


@pytest.mark.parametrize("prox, few", [("paper", 0.6499), ("official", 0.6548)])
def test_without_gradients_the_first_draw_decides(prox, few):
    """Survivors are the components larger than the sum of the thresholds; the official operator wants one more threshold of it."""
    adapter, method = started(CoDyRA(rank=8), weight64(9, 12)), CoDyRA(prox=prox)
    start = torch.tensor([0.2, 0.6495, 0.6503, 0.6540, 0.6560, -0.6495, -0.7, -2.0], dtype=torch.float64)
    with torch.no_grad():
        adapter.gate.copy_(start)
        for step in range(500):
            method.coordinate({"a": adapter}, None, Clock(step + 1, 500, 0))
    gate = adapter.gate.detach()
    assert torch.equal(gate != 0, start.abs() > few)
    torch.testing.assert_close(gate[-2:], torch.tensor([-0.0501, -1.3501], dtype=torch.float64), rtol=0, atol=1e-4)


def test_in_training_ranks_die_late_and_stay_in_the_state():
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 8))
    adapters = attach(network, CoDyRA(rank=8, kappa=0.1, levels=5), "all")
    optimizer = torch.optim.AdamW(adapters.param_groups(1e-3), lr=1e-3)
    x, target = torch.randn(32, 9), torch.randn(32, 8)
    ranks = []
    for step in range(40):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        optimizer.step()
        adapters.coordinate(Clock(step + 1, 40, 0, optimizer))
        ranks.append(sum(int(each.gate.count_nonzero()) for each in adapters.adapters.values()))
    assert ranks[:21] == [16] * 21  # t = 0 to 20 = D
    assert ranks[-1] < 12
    before = network(x).detach()
    merge(network)
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-5)


def test_importances_have_a_group_without_decay():
    adapters = attach(nn.Sequential(nn.Linear(9, 12)), CoDyRA(rank=2), "all")
    factors, gates = adapters.param_groups(1e-3)
    assert (len(factors["params"]), len(gates["params"])) == (2, 1)
    assert gates["weight_decay"] == 0.0 and gates["params"][0].shape == (2,)


def test_compact_has_as_many_ranks_as_importances_that_are_not_zero():
    W = weight64()
    adapter = moved(CoDyRA(rank=5), W)
    with torch.no_grad():
        adapter.gate[[1, 4]] = 0.0
    small = adapter.compact()
    assert small.A.shape == (3, 9)
    assert torch.linalg.matrix_rank(delta(adapter, W)) == 3
    torch.testing.assert_close(delta(small, W), delta(adapter, W), **EXACT)


def test_a_run_too_short_for_the_levels_is_warned_and_keeps_all():
    method, adapter = CoDyRA(rank=4), started(CoDyRA(rank=4), weight64())
    before = adapter.gate.detach().clone()
    with torch.no_grad(), pytest.warns(UserWarning, match="the last 30 steps are too few for 50 levels"):
        for step in range(60):
            method.coordinate({"a": adapter}, None, Clock(step + 1, 60, 0))
    assert torch.equal(adapter.gate, before)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        method.coordinate({"a": adapter}, None, Clock(1, 500, 0))


def test_counts():
    """768 x 768, r = 16: 24,592; CLIP ViT-B/16, six matrices in 24 blocks: 4,425,984."""
    assert CoDyRA().count(site(768, 768)) == 24_592
    total = sum(12 * sum(CoDyRA().count(site(*s)) for s in ((d, d),) * 4 + ((4 * d, d), (d, 4 * d))) for d in (768, 512))
    assert total == 4_425_984
    assert trainables(CoDyRA(rank=3), site(4, 2, 3, 3)) == CoDyRA(rank=3).count(site(4, 2, 3, 3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "method.rank: 0"),
        ({"kappa": -1.0}, "kappa: -1.0 is negative"),
        ({"levels": 1}, "levels: 1 is less than 2"),
        ({"dense": 1.0}, "dense: 1.0 is not in"),
        ({"prox": "soft"}, "prox: 'soft'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        CoDyRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        CoDyRA(rank=10).adapter(site(12, 9), None)
