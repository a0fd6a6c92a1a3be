"""LoRA-FA: A never moves, and the projected gradient is the projection of the dense one."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.lora_fa import LoRAFA
from vision_peft.engine.adapter import Clock
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def adjusted(method, adapter, W, G):
    """The gradient of B as the optimizer would get it."""
    gradients(adapter, W, G)
    with torch.no_grad():
        method.adjust_gradients({"one": adapter}, None, Clock(0, 1, 0))
    return adapter.B.grad


def test_starts_at_the_identity_with_the_factors_of_lora():
    W = torch.randn(12, 9)
    adapter = started(LoRAFA(rank=3), W)
    assert torch.equal(adapter.weight(W), W)
    assert torch.equal(adapter.A, started(LoRA(rank=3), W).A)


def test_the_formula_and_the_row_space():
    W = weight64()
    adapter = moved(LoRAFA(rank=3, alpha=2.0), W)
    D = delta(adapter, W)
    torch.testing.assert_close(D, 2 / 3 * (adapter.B @ adapter.A).detach(), **EXACT)
    stacked = torch.cat([adapter.A, D])
    assert torch.linalg.matrix_rank(stacked) == 3


def test_gradient_of_b_is_that_of_lora():
    W, G = weight64(), weight64()
    adapter = moved(LoRAFA(rank=3, alpha=2.0), W)
    found = gradients(adapter, W, G)
    assert set(found) == {"B"}
    torch.testing.assert_close(found["B"], 2 / 3 * G @ adapter.A.mT, **EXACT)


def test_without_projection_the_gradient_is_left_alone():
    W, G = weight64(), weight64()
    adapter = moved(LoRAFA(rank=3), W)
    torch.testing.assert_close(adjusted(LoRAFA(rank=3), adapter, W, G), adapter.scale * G @ adapter.A.mT, **EXACT)


@pytest.mark.parametrize("alpha, scaling", [(2.0, "rank"), (5.0, "sqrt_rank")])
def test_the_projected_step_is_the_projection_of_the_dense_gradient(alpha, scaling):
    W, G = weight64(), weight64()
    method = LoRAFA(rank=3, alpha=alpha, scaling=scaling, projected=True)
    adapter = moved(method, W)
    step = adapter.scale * adjusted(method, adapter, W, G) @ adapter.A
    Q, _ = torch.linalg.qr(adapter.A.mT)  # (n, r), the row space
    torch.testing.assert_close(step, G @ Q @ Q.mT, rtol=1e-6, atol=1e-6)  # the 1e-8 I
    assert float((step * G).sum()) >= 0
    assert (step - G).norm() <= G.norm()


def test_the_projected_step_does_not_depend_on_the_scale():
    W, G, steps = weight64(), weight64(), []
    for alpha in (1.0, 30.0):
        method = LoRAFA(rank=3, alpha=alpha, projected=True)
        adapter = started(method, W)
        steps.append(adapter.scale * adjusted(method, adapter, W, G) @ adapter.A)
    torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-12)


def test_projection_passes_over_what_has_no_gradient():
    method, W = LoRAFA(rank=2, projected=True), weight64()
    adapter = started(method, W)
    method.adjust_gradients({"one": adapter}, None, Clock(0, 1, 0))
    assert adapter.B.grad is None


@pytest.mark.parametrize("projected", [False, True])
def test_training_moves_b_and_never_a(projected):
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    adapters = attach(network, LoRAFA(rank=2, projected=projected), "all")
    A = {name: adapter.A.clone() for name, adapter in adapters.adapters.items()}
    optimizer = torch.optim.AdamW(adapters.param_groups(1e-2), lr=1e-2)
    x, target = torch.randn(32, 9), torch.randn(32, 4)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = (network(x) - target).square().mean()
        loss.backward()
        adapters.adjust_gradients(Clock(step, 30, 0, optimizer))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, adapter in adapters.adapters.items():
        assert torch.equal(adapter.A, A[name])
        assert adapter.B.any()


def test_a_is_not_stored_but_pinned():
    W = weight64()
    adapter = started(LoRAFA(rank=3), W)
    assert set(adapter.state_dict()) == {"B"}
    torch.testing.assert_close(started(LoRAFA(rank=3), W).fingerprint(), adapter.fingerprint())
    assert not torch.allclose(started(LoRAFA(rank=3), W, seed=1).fingerprint(), adapter.fingerprint(), rtol=1e-3)


def test_counts():
    """6,144 for 768 x 768 at r = 8: half of LoRA."""
    assert LoRAFA(rank=8).count(site(768, 768)) == 6_144
    assert count(LoRAFA(rank=2), clip_vit_b16()) == 92_160
    assert trainables(LoRAFA(rank=3), site(4, 2, 3, 3)) == LoRAFA(rank=3).count(site(4, 2, 3, 3)) == 12


def test_the_projection_against_the_optimizer_of_peft():
    """One step of each from the same point. PEFT multiplies in bfloat16, so its direction is only that exact."""
    pytest.importorskip("peft")
    from peft.optimizers.lorafa import LoraFAOptimizer

    W, G = torch.randn(12, 9), torch.randn(12, 9)
    method = LoRAFA(rank=3, alpha=2.0, projected=True)
    adapter = started(method, W)
    theirs_A, theirs_B = nn.Parameter(adapter.A.clone()), nn.Parameter(adapter.B.detach().clone())
    (2 / 3 * theirs_B @ theirs_A * G).sum().backward()
    group = {"params": [theirs_A, theirs_B], "names": ["lora_A", "lora_B"], "scaling_factors": [2 / 3, 2 / 3]}
    LoraFAOptimizer([group], betas=(0.0, 0.0), lr=1e-3, eps=1e6).step()  # a huge eps makes Adam's step linear in the gradient
    ours = -1e-9 * adjusted(method, adapter, W, G)
    torch.testing.assert_close(theirs_B.detach(), ours, rtol=2e-2, atol=2e-2 * float(ours.abs().max()))


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
        LoRAFA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        LoRAFA(rank=10).adapter(site(12, 9), None)
