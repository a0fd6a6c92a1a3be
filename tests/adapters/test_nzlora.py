"""NZLoRA: both factors random, the start subtracted or left in."""

from __future__ import annotations

import math

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.nzlora import NZLoRA
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def test_starts_at_the_identity():
    W = torch.randn(12, 9)
    torch.testing.assert_close(started(NZLoRA(rank=3), W).weight(W), W, rtol=0, atol=1e-6)
    assert NZLoRA().identity_at_init


def test_without_the_offset_the_start_stays_in_the_weight():
    W = weight64()
    method = NZLoRA(rank=3, alpha=6.0, offset=False)
    adapter = started(method, W)
    assert not method.identity_at_init
    assert delta(adapter, W).abs().max() > 0.01
    torch.testing.assert_close(delta(adapter, W), 2 * (adapter.B @ adapter.A).detach(), **EXACT)
    assert (adapter.A0, adapter.B0, adapter.fingerprint()) == (None, None, None)


@pytest.mark.parametrize("spread_A, spread_B", [(1.0, 1.0), (4.0, 0.25)])
def test_the_spread_of_both_factors(spread_A, spread_B):
    """Uniform within sqrt(c / n), n the width of the input for both."""
    adapter = started(NZLoRA(rank=8, spread_A=spread_A, spread_B=spread_B), torch.zeros(300, 400))
    for factor, spread in ((adapter.A, spread_A), (adapter.B, spread_B)):
        bound = math.sqrt(spread / 400)
        assert 0.98 * bound < factor.abs().max() <= bound
        assert abs(float(factor.detach().var()) / (bound**2 / 3) - 1) < 0.1
        assert abs(float(factor.detach().mean())) < 0.1 * bound


def test_with_a_spread_of_one_a_starts_as_loras():
    W = torch.randn(12, 9)
    assert torch.allclose(started(NZLoRA(rank=3), W).A, started(LoRA(rank=3), W).A, rtol=0, atol=1e-6)


def test_the_formula_after_training():
    W = weight64()
    fresh, adapter = started(NZLoRA(rank=3, alpha=6.0), W), moved(NZLoRA(rank=3, alpha=6.0), W)
    torch.testing.assert_close(delta(adapter, W), (2 * (adapter.B @ adapter.A - fresh.B @ fresh.A)).detach(), **EXACT)


def test_both_factors_have_gradients_at_the_first_step():
    W, G = weight64(), weight64()
    adapter = started(NZLoRA(rank=3, alpha=6.0), W)
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], 2 * G @ adapter.A.mT, **EXACT)
    torch.testing.assert_close(found["A"], 2 * adapter.B.mT @ G, **EXACT)
    assert found["A"].abs().min() > 0
    assert not gradients(started(LoRA(rank=3), W), W, G)["A"].any()


def test_the_start_is_drawn_anew_on_load():
    W = torch.randn(12, 9)
    adapter = moved(NZLoRA(rank=3), W)
    assert set(adapter.state_dict()) == {"A", "B"}
    again = started(NZLoRA(rank=3), W)
    again.load_state_dict(adapter.state_dict())
    assert torch.equal(again.weight(W), adapter.weight(W))
    torch.testing.assert_close(again.fingerprint(), adapter.fingerprint())
    assert not torch.allclose(started(NZLoRA(rank=3), W, seed=1).fingerprint(), adapter.fingerprint(), rtol=1e-3)


def test_counts():
    assert NZLoRA().count(site(768, 768)) == 12_288
    assert trainables(NZLoRA(rank=3), site(4, 2, 3, 3)) == NZLoRA(rank=3).count(site(4, 2, 3, 3)) == 66


@pytest.mark.parametrize(
    "options, message",
    [
        ({"spread_A": 0.0}, "spread_A: 0.0 is not positive"),
        ({"spread_B": -1.0}, "spread_B: -1.0 is not positive"),
        ({"rank": 0}, "rank: 0"),
        ({"scaling": "x"}, "scaling"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        NZLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        NZLoRA(rank=10).adapter(site(12, 9), None)
