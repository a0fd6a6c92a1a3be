"""SNELL: the kernel entry by entry, who survives, gradients by hand, and what is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fakes import delta, gradients, moved, regress, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters._kernel import distance_kernel, order_statistic, recomputed_linear
from vision_peft.adapters.snell import SNELL
from vision_peft.engine.contract import run_contract
from vision_peft.engine.install import attach
from vision_peft.engine.site import enumerate_sites
from vision_peft.errors import UserError


def kernel(adapter):
    """Entry by entry."""
    P, Q, a = adapter.P_out.detach(), adapter.P_in.detach(), torch.tensor(0.1).double()  # stored in float32
    rows = [[a * (P[0, i] - Q[0, j]).norm() - a * (P[1, i] - Q[1, j]).norm() for j in range(Q.shape[1])] for i in range(P.shape[1])]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("s", [0.3, 0.9])
def test_the_formula_of_the_program(s):
    W = weight64()
    adapter = moved(SNELL(rank=6, sparsity=s), W)
    K = kernel(adapter)
    w = torch.quantile(K.abs(), s)
    torch.testing.assert_close(delta(adapter, W), K * K.abs() * (K.abs() > w), rtol=1e-9, atol=1e-14)


def test_the_formula_of_the_paper():
    """The soft threshold is the 33rd smallest of 108 at s = 0.3; what it cuts comes down to zero without a jump."""
    W = weight64()
    adapter = moved(SNELL(rank=6, sparsity=0.3, sparsify="paper"), W)
    K = kernel(adapter)
    w = K.abs().flatten().sort().values[32]
    torch.testing.assert_close(delta(adapter, W), K * (K.abs() - w).clamp(min=0), rtol=1e-9, atol=1e-14)


def test_a_plain_mask():
    W = weight64()
    adapter = moved(SNELL(rank=6, sparsity=0.5, sparsify="hard"), W)
    K = kernel(adapter)
    torch.testing.assert_close(delta(adapter, W), K * (K.abs() > K.abs().quantile(0.5)), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("sparsify, jump", [("code", True), ("hard", True), ("paper", False)])
def test_at_zero_sparsity_the_program_uses_the_kernel_itself(sparsify, jump):
    W = weight64()
    adapter = moved(SNELL(rank=6, sparsity=0.0, sparsify=sparsify), W)
    K = kernel(adapter)
    torch.testing.assert_close(delta(adapter, W), K if jump else K * K.abs(), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("s", [0.1, 0.37, 0.9, 0.995])
def test_how_many_survive(s):
    """N - 1 - floor(s (N - 1)) of N distinct magnitudes."""
    W = torch.randn(40, 31)
    D = delta(moved(SNELL(rank=4, sparsity=s), W), torch.zeros_like(W))
    assert int((D != 0).sum()) == 1239 - int(s * 1239)


def test_gradients_by_hand():
    """Of dW: |K| on survivors, nothing elsewhere; then each distance pulls its two points along their difference."""
    W, G = weight64(), weight64()
    adapter = moved(SNELL(rank=6, sparsity=0.5), W)
    found = gradients(adapter, W, G)
    K = kernel(adapter)
    gK = G * K.abs() * (K.abs() > K.abs().quantile(0.5))
    for h, sign in enumerate(adapter.alpha):
        apart = adapter.P_out[h].detach()[:, None] - adapter.P_in[h].detach()
        pull = sign * (gK / apart.norm(dim=-1))[..., None] * apart
        torch.testing.assert_close(found["P_out"][h], pull.sum(1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found["P_in"][h], -pull.sum(0), rtol=1e-9, atol=1e-12)


def test_gradient_of_the_soft_threshold_is_the_derivative():
    """2 |K| - w on survivors, with w held constant."""
    W, G = weight64(), weight64()
    adapter = moved(SNELL(rank=6, sparsity=0.5, sparsify="paper"), W)
    found = gradients(adapter, W, G)
    K = kernel(adapter).requires_grad_()
    w = K.detach().abs().flatten().sort().values[53]
    [gK] = torch.autograd.grad((K * (K.abs() - w).relu() * G).sum(), K)
    torch.testing.assert_close(gK, G * (2 * K.abs() - w).detach() * (K.abs() > w), rtol=1e-12, atol=0)
    P, Q = (p.detach().requires_grad_() for p in (adapter.P_out, adapter.P_in))
    torch.autograd.backward(0.1 * (torch.cdist(P[0], Q[0]) - torch.cdist(P[1], Q[1])), gK)
    torch.testing.assert_close(found["P_out"], P.grad, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(found["P_in"], Q.grad, rtol=1e-7, atol=1e-10)


def test_the_kernel_differentiates():
    points = [torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(distance_kernel, [each.requires_grad_() for each in points])


def test_coincident_points_have_no_gradient():
    P = torch.randn(2, 5, 3, requires_grad=True)
    distance_kernel(P, P.detach().clone(), torch.tensor([0.1, -0.1])).sum().backward()
    assert P.grad.isfinite().all()


def test_only_differences_count_and_exchanged_halves_change_the_sign():
    W = weight64()
    adapter = moved(SNELL(rank=6, sparsity=0.5), W)
    before = delta(adapter, W)
    with torch.no_grad():
        shift = torch.randn(3, dtype=torch.float64)
        adapter.P_out[1] += shift
        adapter.P_in[1] += shift
    torch.testing.assert_close(delta(adapter, W), before, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        adapter.P_out.copy_(adapter.P_out.flip(0))
        adapter.P_in.copy_(adapter.P_in.flip(0))
    torch.testing.assert_close(delta(adapter, W), -before, rtol=1e-9, atol=1e-12)


def test_scaled_points_leave_the_survivors_alone():
    W = weight64()
    adapter = moved(SNELL(rank=6, sparsity=0.5), W)
    before = delta(adapter, W)
    with torch.no_grad():
        adapter.P_out *= 3
        adapter.P_in *= 3
    torch.testing.assert_close(delta(adapter, W), 9 * before, rtol=1e-9, atol=1e-12)


def test_the_start_is_small_full_rank_and_of_the_stated_size():
    """768 x 768 at r = 8: bound 0.0180, std of K 1.3e-3, largest entry of dW about 2.8e-5, rank 768 where LoRA has 8."""
    W = torch.zeros(768, 768)
    adapter = started(SNELL(rank=8, sparsity=0.0), W)
    assert adapter.alpha.tolist() == pytest.approx([0.1, -0.1])
    for points in (adapter.P_in, adapter.P_out):
        assert points.abs().max().item() == pytest.approx(0.0180, abs=1e-4)
    K = delta(adapter, W)
    assert K.std().item() == pytest.approx(1.3e-3, rel=0.05)
    assert torch.linalg.matrix_rank(K.double()) == 768
    assert delta(started(SNELL(rank=8, sparsity=0.3), W), W).abs().max().item() == pytest.approx(2.8e-5, rel=0.3)


@pytest.mark.parametrize("q", [0.0, 0.25, 0.3, 0.5, 0.99, 1.0])
def test_order_statistics_are_quantiles(q):
    values = torch.randn(31, 41, dtype=torch.float64)
    torch.testing.assert_close(order_statistic(values, q * (values.numel() - 1)), values.quantile(q), rtol=1e-12, atol=1e-14)


def test_order_statistics_of_ties():
    values = torch.tensor([2.0, 1, 2, 2, 5])
    assert [float(order_statistic(values, p)) for p in (0, 0.5, 1, 1.5, 2.5, 3, 3.5, 4)] == [1, 1.5, 2, 2, 2, 2, 3.5, 5]


def test_rebuilding_the_weight_gives_the_gradients_of_keeping_it():
    W, x, b = weight64(), torch.randn(4, 5, 9, dtype=torch.float64, requires_grad=True), torch.randn(12, dtype=torch.float64)
    adapter = moved(SNELL(rank=6, sparsity=0.5, learn_alpha=True), W)
    results = []
    for y in (adapter.linear(x, W, b), F.linear(x, adapter.weight(W), b)):
        grads = torch.autograd.grad(y.square().sum(), [x, *adapter.parameters()])
        results.append([y.detach(), *grads])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-11)


def test_gradients_of_the_bias_and_of_rebuilding_without_a_base():
    x, b, U = torch.randn(5, 9).double(), torch.randn(12).double(), weight64()
    inputs = [each.requires_grad_() for each in (x, b, U)]
    assert torch.autograd.gradcheck(lambda x, b, U: recomputed_linear(x, None, b, torch.tanh, U), inputs)


def test_no_dense_matrix_is_kept_for_the_backward_pass():
    network = nn.Linear(64, 96)
    attach(network, SNELL(rank=4, sparsity=0.5), "all")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        network(torch.randn(5, 64, requires_grad=True)).sum()
    own = {t.data_ptr() for t in kept} - {network.weight.data_ptr()}
    assert own
    assert max(t.numel() for t in kept if t.data_ptr() in own) < 64 * 96 / 4


def test_dropout_touches_the_branch_alone():
    W, b, x = torch.randn(12, 9), torch.randn(12), torch.randn(2000, 9)
    adapter = moved(SNELL(rank=6, sparsity=0.5, dropout=0.5), W).train()
    full = F.linear(x, W, b) + x @ delta(adapter, W).mT
    torch.testing.assert_close(adapter.eval().linear(x, W, b), full, rtol=1e-4, atol=1e-5)
    dropped = adapter.train().linear(x, W, b)
    assert not torch.allclose(dropped, full, rtol=1e-3)
    torch.testing.assert_close(adapter.linear(torch.zeros(3, 9), W, b), b.expand(3, 12))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    W, x = torch.randn(12, 9), torch.randn(400, 3, 9)
    adapter = moved(SNELL(rank=6, sparsity=0.5, drop_path=0.25), W).train()
    branch = x @ delta(adapter, W).mT
    found = (adapter.linear(x, W, None) - F.linear(x, W)).detach()
    dropped = found.abs().amax((1, 2)) < 1e-5
    assert 0.15 < dropped.float().mean() < 0.35
    torch.testing.assert_close(found[~dropped], branch[~dropped] / 0.75, rtol=1e-3, atol=1e-4)


def test_training_moves_which_entries_survive():
    torch.manual_seed(0)
    network = nn.Linear(12, 10)
    adapters = attach(network, SNELL(rank=4, sparsity=0.7), "all")
    adapter = next(iter(adapters.adapters.values()))
    W, x, target = network.weight.detach(), torch.randn(64, 12), torch.randn(64, 10)
    before = delta(adapter, W) != 0
    losses = regress(network, adapters, x, target, lr=0.05)
    after = delta(adapter, W).abs() > 0
    assert losses[-1] < 0.97 * losses[0]
    assert abs(int(after.sum()) - int(before.sum())) <= 1
    assert (before != after).any()


@pytest.mark.parametrize("options", [{"sparsify": "paper"}, {"sparsify": "hard"}, {"sparsity": 0.0}, {"learn_alpha": True}])
def test_the_contract_in_the_other_modes(options):
    network = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8))
    x = torch.randn(5, 12)
    checks = run_contract(network, enumerate_sites(network), SNELL(**{"rank": 4, **options}), lambda network: network(x))
    assert not [check for check in checks if not check.passed]


def test_counts():
    """r (m + n): 12,288 for 768 x 768 at r = 8; 165,888 r over the linear layers of a ViT-B."""
    assert SNELL(rank=8).count(site(768, 768)) == 12_288
    block = 4 * [site(768, 768)] + [site(3072, 768), site(768, 3072)]
    assert 12 * sum(SNELL(rank=32).count(each) for each in block) == 5_308_416
    assert trainables(SNELL(rank=4, learn_alpha=True), site(8, 4, 3, 3)) == SNELL(rank=4, learn_alpha=True).count(site(8, 4, 3, 3)) == 178


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 3}, "rank: 3 is not a positive even number"),
        ({"rank": 0}, "rank: 0"),
        ({"sparsity": 1.0}, "sparsity: 1.0 is not in"),
        ({"sparsity": -0.1}, "sparsity: -0.1"),
        ({"sparsify": "soft"}, "sparsify: 'soft' is not one of code, paper, hard"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"drop_path": 1.0}, "drop_path: 1.0 is not in"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        SNELL(**options)
