"""SwitchLoRA: a weight that does not move when vectors are exchanged, and the optimizer's book-keeping, step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from fakes import gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.switchlora import SwitchLoRA
from vision_peft.engine.adapter import Clock
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

STEADY = {"interval": 12.0, "decay": 1e15, "freeze": 5}  # r / 12 exchanges a step, always


def regression(method, seed=0, shape=(40, 48), dtype=torch.float32):
    torch.manual_seed(seed)
    network = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    adapters = attach(network, method, "all").to(dtype)
    with torch.no_grad():  # a new start in that type
        adapters.initialize(network)
    return network, adapters, next(iter(adapters.adapters.values()))


def train(network, adapters, first, last, total=200, optimizer=None, lr=0.02, before=lambda step: None, after=lambda step: None):
    W = network.weight
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(64, size, generator=generator).to(W) for size in (W.shape[1], W.shape[0]))
    optimizer = optimizer or torch.optim.AdamW(adapters.param_groups(lr), lr=lr)
    for step in range(first, last):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        adapters.adjust_gradients(Clock(step, total, 0, optimizer))
        before(step)
        optimizer.step()
        adapters.coordinate(Clock(step + 1, total, 0, optimizer))
        after(step + 1)
    return optimizer


def test_starts_at_the_identity_with_both_factors():
    W = weight64()
    adapter = started(SwitchLoRA(rank=3), W)
    torch.testing.assert_close(adapter.weight(W), W, rtol=0, atol=1e-15)
    assert adapter.A.any()
    assert adapter.B.any()


@pytest.mark.parametrize(
    "shape, rank, bounds",
    [((768, 768), 8, (0.4204, 0.4204)), ((768, 768), 64, (0.7071, 0.7071)), ((3072, 768), 64, (0.8409, 0.5946))],
)
def test_bounds_of_the_start(shape, rank, bounds):
    adapter = started(SwitchLoRA(rank=rank), torch.zeros(shape))
    found = [adapter.sides[side].pool.abs().max().item() for side in "AB"]
    assert found == pytest.approx(bounds, abs=2e-4)
    product = (adapter.scale * adapter.B @ adapter.A).std().item()
    assert product == pytest.approx((1 / 3) ** 0.5 / 768**0.5, rel=0.1)  # as Kaiming's start


def test_which_candidates_are_loaded_first():
    """The last r, those of B turned by half of r."""
    adapter = started(SwitchLoRA(rank=4), torch.randn(12, 9))
    assert adapter.sides["A"].slot.tolist() == [5, 6, 7, 8]
    assert adapter.sides["B"].slot.tolist() == [7, 8, 5, 6]
    assert torch.equal(adapter.A, adapter.sides["A"].pool[5:])
    assert torch.equal(adapter.B[:, 0], adapter.sides["B"].pool[7])
    assert adapter.turn.tolist() == [0, 2]


def test_the_formula_and_its_gradients():
    W, G = weight64(), weight64()
    adapter = moved(SwitchLoRA(rank=3, alpha=2.0), W)
    expected = W + adapter.offset + 2 / 3 * adapter.B @ adapter.A
    torch.testing.assert_close(adapter.weight(W), expected, rtol=1e-12, atol=1e-13)
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], 2 / 3 * G @ adapter.A.detach().mT, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found["A"], 2 / 3 * adapter.B.detach().mT @ G, rtol=1e-11, atol=1e-12)


def test_the_weight_does_not_move_when_vectors_are_exchanged():
    W = torch.randn(40, 48, dtype=torch.float64)
    adapter = moved(SwitchLoRA(rank=8), W)
    before, offset = adapter.weight(W).detach(), adapter.offset.clone()
    with torch.no_grad():
        for step in range(130):  # after 40 exchanges of each of 8 places nothing would have changed: nothing is trained
            adapter.switch(1.5, 5, step)
            for held in adapter.sides.values():
                held.frozen.sub_(1).clamp_(min=0)
    torch.testing.assert_close(adapter.weight(W).detach(), before, rtol=1e-10, atol=1e-11)
    assert (adapter.offset - offset).abs().max() > 0.1


def test_as_many_rows_as_columns_change_at_different_places():
    W = torch.randn(40, 48)
    adapter = moved(SwitchLoRA(rank=12), W)
    A, B = adapter.A.detach().clone(), adapter.B.detach().clone()
    with torch.no_grad():
        adapter.switch(2.0, 5, 0)
    rows, columns = (A != adapter.A).any(1).nonzero().flatten(), (B != adapter.B).any(0).nonzero().flatten()
    assert rows.tolist() == [0, 1]
    assert columns.tolist() == [6, 7]
    assert adapter.sides["A"].frozen.nonzero().flatten().tolist() == [6, 7]
    assert adapter.sides["B"].frozen.nonzero().flatten().tolist() == [0, 1]
    assert adapter.turn.tolist() == [2, 8]


def test_candidates_are_taken_in_a_cycle_and_come_back_as_they_left():
    W = torch.randn(12, 9)
    adapter = started(SwitchLoRA(rank=4), W)
    held = adapter.sides["A"]
    with torch.no_grad():
        adapter.A.normal_()
        first = adapter.A[0].clone()  # from slot 5
        seen = []
        for step in range(40):
            before = held.slot.clone()
            adapter.switch(1.0, 0, step)
            [row] = (held.slot != before).nonzero().flatten().tolist()
            seen.append(int(held.slot[row]))
            if seen[-1] == 5:
                break
            assert len(set(held.slot.tolist())) == 4
    assert seen == [0, 1, 2, 3, 4, 5]
    assert torch.equal(adapter.A[row], first)


def test_nothing_is_lost():
    """Every candidate is either in its place in the pool or loaded."""
    W = torch.randn(12, 9)
    adapter = started(SwitchLoRA(rank=4), W)
    everything = adapter.sides["B"].pool.clone()
    with torch.no_grad():
        for step in range(23):
            adapter.switch(1.0, 0, step)
    held = adapter.sides["B"]
    now = held.pool.clone()
    now[held.slot] = adapter.B.detach().mT
    assert torch.equal(now, everything)


def test_counts_of_steps_in_the_worked_example():
    """r = 24, two exchanges a step, never held up: before the fifteenth step the rows of A count 8, 8, 7, 7, ... 1, 1, 12, 12, ... 9, 9."""
    network, adapters, adapter = regression(SwitchLoRA(rank=24, **STEADY), shape=(60, 64))
    seen = {}
    train(network, adapters, 0, 15, before=lambda step: seen.update({step: adapter.sides["A"].steps.tolist()}))
    assert seen[14] == [each for count in (8, 7, 6, 5, 4, 3, 2, 1, 12, 11, 10, 9) for each in (count, count)]


def test_frozen_vectors_are_disjoint_from_exchanged_ones_and_do_not_move():
    network, adapters, adapter = regression(SwitchLoRA(rank=24, **STEADY), shape=(60, 64))
    frozen, values, counted = {}, {}, []

    def before(step):
        frozen[step] = {side: held.frozen > 0 for side, held in adapter.sides.items()}
        values[step] = {side: adapter.vectors(side).detach().clone() for side in "AB"}
        counted.append(int(frozen[step]["A"].sum()))

    optimizer = torch.optim.AdamW(adapters.param_groups(0.02), lr=0.02)
    after = {}
    original = optimizer.step
    optimizer.step = lambda: (original(), after.update({len(after): {side: adapter.vectors(side).detach().clone() for side in "AB"}}))
    train(network, adapters, 0, 20, optimizer=optimizer, before=before)
    assert counted[:8] == [0, 2, 4, 6, 8, 10, 10, 10]  # n min(t, N)
    for step in range(20):
        for side in "AB":
            still = (values[step][side] == after[step][side]).all(1)
            assert torch.equal(still, frozen[step][side])


def test_moments_of_counterparts_are_zero_and_the_others_stay():
    network, adapters, adapter = regression(SwitchLoRA(rank=24, **STEADY), shape=(60, 64))
    optimizer = torch.optim.AdamW(adapters.param_groups(0.02), lr=0.02)
    train(network, adapters, 0, 4, optimizer=optimizer)
    A, B = (optimizer.state[parameter] for parameter in (adapter.A, adapter.B))
    reset = list(range(8))  # four exchanges of two: rows 0 to 7 of A, so columns 0 to 7 of B; columns 12 to 19, so rows 12 to 19
    for name in ("exp_avg", "exp_avg_sq"):
        assert (~B[name].any(0)).nonzero().flatten().tolist() == reset
        assert (~A[name].any(1)).nonzero().flatten().tolist() == [12 + each for each in reset]


def test_the_whole_loop_against_adam_written_out_with_a_count_for_each_vector():
    """Float64, 60 steps: W' of the method on a plain AdamW is that of the update formulas."""
    method = SwitchLoRA(rank=8, interval=8.0, decay=1e15, freeze=2)
    network, adapters, adapter = regression(method, shape=(20, 24), dtype=torch.float64)
    W = network.weight.detach()
    A, B, offset = (each.detach().clone() for each in (adapter.A, adapter.B.mT, adapter.offset))
    CA, CB = (adapter.sides[side].pool.clone() for side in "AB")
    selA, selB = (adapter.sides[side].slot.tolist() for side in "AB")
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(64, size, generator=generator).double() for size in (24, 20))
    train(network, adapters, 0, 60, total=60, lr=0.02)

    moments = {side: [torch.zeros_like(F), torch.zeros_like(F), [0] * 8, [0] * 8] for side, F in (("A", A), ("B", B))}
    a, b = 0, 4
    for _ in range(60):
        G = 2 * (x @ (W + offset + B.mT @ A / 8).mT - target).mT @ x / target.numel()
        for F, side, g in ((A, "A", B @ G / 8), (B, "B", A @ G.mT / 8)):
            m, v, count, frozen = moments[side]
            for i in range(8):
                gi = g[i] * (frozen[i] == 0)
                count[i] += 1
                m[i] = 0.9 * m[i] + 0.1 * gi
                v[i] = 0.999 * v[i] + 0.001 * gi**2
                frozen[i] = max(0, frozen[i] - 1)
                F[i] -= 0.02 * (m[i] / (1 - 0.9 ** count[i])) / ((v[i] / (1 - 0.999 ** count[i])).sqrt() + 1e-8)
        number = min((a - sum(f > 0 for f in moments["A"][3]) - b) % 8, (b - sum(f > 0 for f in moments["B"][3]) - a) % 8, 1)
        for F, other, C, sel, i, side in ((A, B, CA, selA, a, "B"), (B, A, CB, selB, b, "A")):
            if number:
                d = (sel[i - 1] + 1) % 20
                change = F[i] - C[d]
                offset += (torch.outer(other[i], change) if side == "B" else torch.outer(change, other[i])) / 8
                C[sel[i]] = F[i]
                F[i] = C[d]
                sel[i] = d
                m, v, count, frozen = moments[side]
                m[i], v[i], count[i], frozen[i] = 0, 0, 0, 2
        a, b = (a + number) % 8, (b + number) % 8
    torch.testing.assert_close(adapter.weight(W).detach(), W + offset + B.mT @ A / 8, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(adapter.A.detach(), A, rtol=1e-7, atol=1e-8)
    assert adapter.sides["A"].slot.tolist() == selA != list(range(12, 20))


def test_exchanges_a_step_follow_the_schedule():
    """r = 24, interval 12, decay 0.1 of 100 steps: 0.6 after step 9, where the rate is 0.3; on the average of the draws too."""
    network, adapters, adapter = regression(SwitchLoRA(rank=24, interval=12.0, decay=0.1, freeze=5), shape=(60, 64))
    wanted, switch = {}, adapter.switch
    adapter.switch = lambda number, freeze, step: wanted.update({step: number}) or switch(number, freeze, step)
    train(network, adapters, 0, 20, total=100)
    assert wanted[9] == pytest.approx(0.6)
    assert wanted[19] == pytest.approx(0.18)
    with torch.no_grad():
        counts = [switch(0.6, 0, step).shape[1] for step in range(500)]
    assert set(counts) == {0, 1}
    assert 0.53 < sum(counts) / 500 < 0.67


def test_the_sum_of_all_changes_is_not_of_low_rank():
    ranks = []
    for interval in (10.0, 1e12):
        network, adapters, adapter = regression(SwitchLoRA(rank=4, alpha=4.0, interval=interval, decay=1e15, freeze=1))
        train(network, adapters, 0, 150, lr=0.05)
        change = (adapter.weight(network.weight) - network.weight).detach().double()
        ranks.append(int((torch.linalg.svdvals(change) > 1e-3).sum()))
    assert ranks[0] > 16
    assert ranks[1] <= 8  # W + s (B A - B_0 A_0): LoRA from another start


def test_without_candidates_to_spare_it_is_lora():
    network, adapters, adapter = regression(SwitchLoRA(rank=8, **STEADY), shape=(8, 16))
    offset = adapter.offset.clone()
    train(network, adapters, 0, 20)
    assert torch.equal(adapter.offset, offset)
    assert adapter.sides["A"].slot.tolist() == list(range(8))


def test_a_resumed_run_goes_on_identically():
    method = SwitchLoRA(rank=8, interval=10.0, decay=1.0, freeze=3)
    network, adapters, _ = regression(method)
    optimizer = train(network, adapters, 0, 17)
    held = copy.deepcopy((adapters.state_dict(), optimizer.state_dict()))
    train(network, adapters, 17, 60, optimizer=optimizer)
    network2, resumed, _ = regression(method)
    resumed.load_state_dict(held[0])
    second = torch.optim.AdamW(resumed.param_groups(0.02), lr=0.02)
    second.load_state_dict(held[1])
    train(network2, resumed, 17, 60, optimizer=second)
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in adapters.state_dict().items())


def test_another_optimizer():
    network, adapters, adapter = regression(SwitchLoRA(rank=8, **STEADY))
    train(network, adapters, 0, 20, optimizer=torch.optim.SGD(adapters.parameters(), lr=0.1))
    assert adapter.weight(network.weight).isfinite().all()
    assert adapter.sides["A"].slot.tolist() != list(range(32, 40))


def test_no_weight_decay():
    adapters = regression(SwitchLoRA(rank=4))[1]
    [group] = adapters.param_groups(1e-3)
    assert group["weight_decay"] == 0
    assert len(group["params"]) == 2


def test_counts():
    """768 x 768 at r = 64: 98,304 trained, 1,179,648 candidate numbers."""
    assert SwitchLoRA(rank=64).count(site(768, 768)) == 98_304
    adapter = SwitchLoRA(rank=64).adapter(site(768, 768), None)
    assert sum(held.pool.numel() for held in adapter.sides.values()) == 1_179_648
    assert trainables(SwitchLoRA(rank=3), site(8, 4, 3, 3)) == SwitchLoRA(rank=3).count(site(8, 4, 3, 3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: 0"),
        ({"freeze": -1}, "freeze: -1 is negative"),
        ({"interval": 9.0}, "interval: 9.0 is below 10, twice freeze"),
        ({"interval": 0.5, "freeze": 0}, "interval: 0.5"),
        ({"decay": 0.0}, "decay: 0.0 is not positive"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        SwitchLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        SwitchLoRA(rank=10).adapter(site(12, 9), None)
