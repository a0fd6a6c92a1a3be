"""LoCA: the inverse transform of scipy, its gradients by hand, and a schedule that leaves the idle group alone."""

from __future__ import annotations

import copy

import pytest
import scipy.fft
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.loca import LoCA
from vision_peft.engine.adapter import Clock
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

SHAPES = [(12, 9), (9, 12), (8, 8)]
EXACT = {"rtol": 0, "atol": 1e-12}


def positions(adapter, W, upper=1.0):
    size = torch.tensor(W.shape)[:, None] - 1
    return (adapter.locations.detach().clamp(0, upper) * size).round().long()


def spectrum(adapter, W, upper=1.0):
    S = torch.zeros(W.shape, dtype=W.dtype)
    for a, row, col in zip(adapter.a.tolist(), *positions(adapter, W, upper).tolist()):
        S[row, col] += a
    return S


def idct(S):
    return torch.from_numpy(scipy.fft.idctn(S.numpy(), norm="ortho"))


def dct(G):
    return torch.from_numpy(scipy.fft.dctn(G.numpy(), norm="ortho"))


def at(adapter, W, *places, a=None):
    """Coefficients at these (row, column) places."""
    size = torch.tensor(W.shape, dtype=torch.float64) - 1
    with torch.no_grad():
        adapter.locations.copy_((torch.tensor(places, dtype=torch.float64) / size).mT)
        adapter.a.copy_(torch.tensor(a, dtype=torch.float64))
    return adapter


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    adapter = started(LoCA(coefficients=20), W)
    assert torch.equal(adapter.weight(W), W)
    assert 0 <= adapter.locations.min() < 0.2 and 0.8 < adapter.locations.max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("variant, upper", [("corrected", 1.0), ("official", 0.999)])
def test_the_formula_against_scipy(shape, variant, upper):
    """Locations moved far outside [0, 1] too, and many on the same place."""
    W = weight64(*shape)
    adapter = moved(LoCA(coefficients=40, scale=0.7, variant=variant), W)
    torch.testing.assert_close(delta(adapter, W), 0.7 * idct(spectrum(adapter, W, upper)), **EXACT)


def test_official_clamp_never_reaches_the_last_row_of_a_wide_layer():
    W = torch.zeros(768, 4)
    for variant, last in (("corrected", 767), ("official", 766)):
        adapter = started(LoCA(coefficients=1, variant=variant), W)
        with torch.no_grad():
            adapter.locations.copy_(torch.tensor([[1.0], [0.0]]))
            adapter.a.fill_(1.0)
        K = dct(delta(adapter, W).double())
        assert K.abs().argmax() == last * 4


def test_coefficients_on_one_place_add_up():
    W = weight64()
    together = at(started(LoCA(coefficients=2), W), W, (3, 2), (3, 2), a=[1.5, 2.0])
    alone = at(started(LoCA(coefficients=1), W), W, (3, 2), a=[3.5])
    torch.testing.assert_close(together.weight(W), alone.weight(W), **EXACT)


def test_norm_and_rank_at_distinct_places():
    """||D||_F = s ||a||, rank at most the number of rows used."""
    W = weight64()
    adapter = at(started(LoCA(coefficients=4, scale=2.0), W), W, (0, 0), (0, 5), (7, 5), (7, 8), a=[1.0, -2.0, 3.0, 0.5])
    D = delta(adapter, W)
    assert float(D.norm()) == pytest.approx(2 * float(adapter.a.detach().norm()), rel=1e-12)
    assert torch.linalg.matrix_rank(D) == 2


def test_the_first_place_is_a_constant():
    W = weight64()
    adapter = at(started(LoCA(coefficients=1, scale=3.0), W), W, (0, 0), a=[2.0])
    torch.testing.assert_close(delta(adapter, W), torch.full_like(W, 6 / 108**0.5), **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_coefficients(shape):
    """Entries of the transformed gradient; the locations, whose turn it is not, get none."""
    W, G = weight64(*shape), weight64(*shape)
    adapter = moved(LoCA(coefficients=30, scale=0.5), W)
    found = gradients(adapter, W, G)
    rows, cols = positions(adapter, W)
    torch.testing.assert_close(found["a"], dct(0.5 * G)[rows, cols], **EXACT)
    assert found["locations"] is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 0.05])
def test_gradients_of_locations(shape, size):
    """Central differences on the grid with clipped neighbours, clamped (at size 1 many are), times the side; 0 outside [0, 1]."""
    W, G = weight64(*shape), size * weight64(*shape)
    adapter = moved(LoCA(coefficients=60, scale=0.5), W)
    adapter.locating.fill_(True)
    found = gradients(adapter, W, G)
    K, (p, q) = dct(0.5 * G), shape
    clamped = 0
    for k, (row, col) in enumerate(positions(adapter, W).mT.tolist()):
        a = adapter.a[k].item()
        down = 0.5 * a * float(K[min(row + 1, p - 1), col] - K[max(row - 1, 0), col])
        right = 0.5 * a * float(K[row, min(col + 1, q - 1)] - K[row, max(col - 1, 0)])
        for axis, (slope, side) in enumerate(((down, p - 1), (right, q - 1))):
            outside = not 0 <= adapter.locations[axis, k].item() <= 1
            clamped += abs(slope) > 1 and not outside
            expected = 0.0 if outside else max(-1.0, min(1.0, slope)) * side
            assert float(found["locations"][axis, k]) == pytest.approx(expected, abs=1e-11)
    assert (clamped > 0) == (size == 1.0)
    assert found["a"] is None


def test_no_location_gradient_before_coefficients_have_moved():
    W = weight64()
    adapter = started(LoCA(coefficients=10), W)
    adapter.locating.fill_(True)
    assert not gradients(adapter, W, weight64())["locations"].any()


def test_turns():
    """10 of coefficients, 20 of locations, up to a tenth of 700 steps; then coefficients alone."""
    method = LoCA()
    turns = [method.locates(step, 700) for step in range(700)]
    expected = [False] * 10 + [True] * 20 + [False] * 10 + [True] * 20 + [False] * 640
    assert turns == expected
    assert not any(LoCA(location_share=0.0).locates(step, 100) for step in range(100))
    assert not any(method.locates(step, 90) for step in range(90)), "too short a run"
    assert LoCA().steps_to_train == 110 and any(method.locates(step, 110) for step in range(110))


def training(method, steps, network=None, state=None, start=0, total=12):
    """AdamW on a small network; yields the state of the adapter set after every step."""
    network = network or nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    adapters = attach(network, method, "0")
    optimizer = torch.optim.AdamW(adapters.param_groups(0.05), lr=0.05, weight_decay=0.1)
    if state is not None:
        adapters.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    x, target = torch.randn(32, 9, generator=torch.Generator().manual_seed(1)), torch.zeros(32, 4)
    for step in range(start, start + steps):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        adapters.adjust_gradients(Clock(step, total, 0, optimizer))
        optimizer.step()
        adapters.coordinate(Clock(step + 1, total, 0, optimizer))
        yield copy.deepcopy((adapters.state_dict(), optimizer.state_dict()))


SHORT = {"coefficients": 30, "coefficient_steps": 2, "location_steps": 2, "location_share": 0.5, "location_lr": 0.02}


def test_only_the_group_whose_turn_it_is_moves_and_its_moments_alone():
    """aallaa, then coefficients to the end; under weight decay and with the momentum of earlier steps."""
    before, moves = None, ""
    for state, optimizer in training(LoCA(**SHORT), 12):
        if before is not None:
            a, where = (not torch.equal(before[0][key], state[key]) for key in ("adapters.0.a", "adapters.0.locations"))
            assert a != where
            moves += "a" if a else "l"
            was, idle = (each["state"].get(1 if a else 0) for each in (before[1], optimizer))
            assert (was is None) == (idle is None)
            if idle is not None:  # it had a turn earlier
                assert torch.equal(idle["exp_avg"], was["exp_avg"]) and idle["step"] == was["step"]
        before = state, optimizer
    assert moves == "allaaaaaaaa"  # the first of the 12 steps is before the comparison


def test_a_resumed_run_goes_on_as_it_would_have():
    """Cut inside a block of locations."""
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    whole = list(training(LoCA(**SHORT), 8, copy.deepcopy(network)))
    assert whole[2][0]["adapters.0.locating"]
    resumed = list(training(LoCA(**SHORT), 5, copy.deepcopy(network), whole[2], start=3))
    for key, value in whole[-1][0].items():
        assert torch.equal(resumed[-1][0][key], value), key


def test_zeros_in_place_of_a_missing_gradient_are_taken_away():
    """What data-parallel training leaves for a parameter without gradient."""
    method = LoCA(coefficients=4)
    adapter = started(method, torch.randn(6, 5))
    for locating in (False, True):
        adapter.locating.fill_(locating)
        for parameter in adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
        method.adjust_gradients({"0": adapter}, None, Clock(0, 1, 0))
        assert (adapter.a.grad is None) == locating
        assert (adapter.locations.grad is None) != locating


def test_groups():
    """Locations have a rate of their own and no decay, wherever the optimizer's rate stands."""
    method = LoCA()
    adapters = {name: method.adapter(site(12, 9), None) for name in "xy"}
    coefficients, locations = method.param_groups(adapters, None, 0.5)
    assert [len(group["params"]) for group in (coefficients, locations)] == [2, 2]
    assert "lr" not in coefficients and locations["lr"] == 1e-4 and locations["weight_decay"] == 0
    [alone] = LoCA(location_share=0.0).param_groups(adapters, None, 0.5)
    assert all(any(p is adapter.a for p in alone["params"]) for adapter in adapters.values())


def test_counts():
    """24 matrices of ViT-B at 3000: 72,000 coefficients; while positions are learned, three times as many numbers are trained."""
    assert 24 * LoCA(coefficients=3000, location_share=0.0).count(site(768, 768)) == 72_000
    assert LoCA(coefficients=3000).count(site(768, 768)) == 9_000
    for shape in ((12, 9), (4, 2, 3, 3), (64, 32)):
        for share in (0.0, 0.1):
            assert trainables(LoCA(location_share=share), site(*shape)) == LoCA(location_share=share).count(site(*shape))
    assert LoCA(location_share=0.0).count(site(4, 3, 3)) == 36, "no more than there are entries"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"coefficients": 0}, "coefficients: 0"),
        ({"coefficient_steps": 0}, "coefficient_steps: 0"),
        ({"location_steps": -1}, "location_steps: -1"),
        ({"location_share": 1.5}, "location_share: 1.5"),
        ({"location_lr": 0.0}, "location_lr: 0.0"),
        ({"variant": "paper"}, "variant: 'paper' is not one of corrected, official"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LoCA(**options)
