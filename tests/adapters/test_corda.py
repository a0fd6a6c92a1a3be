"""CorDA: components of the weight ordered by what they do to the inputs."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, site, trainables, weight64
from torch import nn

from vision_peft.adapters.corda import CorDA
from vision_peft.adapters.pissa import PiSSA
from vision_peft.engine.adapter import Evidence
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-9}
MODES = ["instruction_previewed", "knowledge_preserved"]


def started(method, W, C):
    adapter = method.adapter(site(*W.shape), None).to(W.dtype)
    with torch.no_grad():
        adapter.initialize(W, Evidence(torch.Generator().manual_seed(0), covariance=C))
    return adapter


def inputs(columns=9, rows=200):
    """Of uneven directions."""
    return weight64(rows, columns) * torch.logspace(0, -2, columns).double() @ weight64(columns, columns)


def covariance(columns=9):
    x = inputs(columns)
    return x.mT @ x / len(x)


@pytest.mark.parametrize("mode", MODES)
def test_starts_at_the_identity(mode):
    W = torch.randn(12, 9)
    torch.testing.assert_close(started(CorDA(rank=3, mode=mode), W, covariance().float()).weight(W), W, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
@pytest.mark.parametrize("alpha", [3.0, 8.0])
@pytest.mark.parametrize("mode", MODES)
def test_the_start_written_out(shape, alpha, mode):
    W, C = weight64(*shape), covariance(shape[1])
    adapter = started(CorDA(rank=3, alpha=alpha, mode=mode), W, C)
    damped = C + 0.01 * C.diagonal().mean() * torch.eye(shape[1]).double()
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    kept = slice(None, 3) if mode == "instruction_previewed" else slice(-3, None)
    expected = U[:, kept] * S[kept] @ Vh[kept] @ torch.linalg.inv(damped)
    torch.testing.assert_close(adapter.scale * adapter.B @ adapter.A, expected, **EXACT)


def test_all_components_give_the_weight_back():
    W = weight64()
    adapter = started(CorDA(rank=9), W, covariance())
    torch.testing.assert_close(adapter.scale * adapter.B @ adapter.A, W, **EXACT)


def test_the_two_modes_are_complements():
    W, C = weight64(), covariance()
    first, last = (started(CorDA(rank=rank, mode=mode), W, C) for rank, mode in zip((4, 5), MODES))
    torch.testing.assert_close(first.scale * first.B @ first.A + last.scale * last.B @ last.A, W, **EXACT)


def test_what_the_modes_are_for():
    """Taking the large components out of W hurts the outputs on these inputs most, the small ones least."""
    W, x = weight64(), inputs()
    errors = {}
    for mode in MODES:
        adapter = started(CorDA(rank=3, mode=mode), W, x.mT @ x / len(x))
        errors[mode] = float((x @ (adapter.scale * adapter.B @ adapter.A).mT).detach().norm())
    whole = float((x @ W.mT).norm())
    assert errors["instruction_previewed"] > 0.9 * whole
    assert errors["knowledge_preserved"] < 0.05 * whole


def test_with_even_inputs_it_is_pissa():
    W = weight64()
    corda = started(CorDA(rank=3), W, 5 * torch.eye(9).double())
    pissa = PiSSA(rank=3).adapter(site(12, 9), None).double()
    with torch.no_grad():
        pissa.initialize(W, Evidence(torch.Generator()))
    torch.testing.assert_close(corda.B @ corda.A, pissa.B @ pissa.A, **EXACT)


def test_the_size_of_the_inputs_does_not_matter():
    W, C = weight64(), covariance()
    one, other = started(CorDA(rank=3), W, C), started(CorDA(rank=3), W, 1e4 * C)
    torch.testing.assert_close(one.B @ one.A, other.B @ other.A, **EXACT)
    torch.testing.assert_close(one.A.norm(), other.A.norm(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_that_are_zero_or_span_little_give_a_start_that_trains(mode):
    W, x = torch.randn(12, 9), torch.randn(2, 9)
    for C in (torch.zeros(9, 9), x.mT @ x):
        adapter = started(CorDA(rank=3, mode=mode), W, C)
        torch.testing.assert_close(adapter.weight(W), W, rtol=0, atol=1e-4)
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(adapter, W, torch.randn(12, 9)).values())


@pytest.mark.parametrize("mode", MODES)
def test_against_the_decomposition_of_peft(mode):
    corda = pytest.importorskip("peft.tuners.lora.corda")
    layer = nn.Linear(9, 12)
    layer.covariance_matrix = covariance().float() / 10
    found = corda.collect_eigens_for_layer(layer, None)
    kept = slice(None, 3) if mode == "instruction_previewed" else slice(-3, None)
    theirs = found.U_WC[:, kept] * found.S_WC[kept] @ found.V_WC[:, kept].mT
    ours = started(CorDA(rank=3, mode=mode), layer.weight.detach(), layer.covariance_matrix)
    torch.testing.assert_close((ours.scale * ours.B @ ours.A).detach(), theirs.detach(), rtol=1e-2, atol=1e-3)


def test_the_formula_after_training():
    W = weight64()
    adapter = started(CorDA(rank=3, alpha=6.0), W, covariance())
    start = (adapter.B @ adapter.A).detach()
    with torch.no_grad():
        adapter.A.normal_(), adapter.B.normal_()
    torch.testing.assert_close(delta(adapter, W), 2 * ((adapter.B @ adapter.A).detach() - start), **EXACT)


def test_the_start_is_stored_and_needs_no_evidence_on_load():
    W = torch.randn(12, 9)
    adapter = started(CorDA(rank=3), W, covariance().float())
    with torch.no_grad():
        adapter.A.normal_(), adapter.B.normal_()
    assert set(adapter.state_dict()) == {"A", "B", "A0", "B0"}
    other = started(CorDA(rank=3), W, None)
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(other.weight(W), adapter.weight(W))


def test_only_layers_that_multiply_an_input_are_adapted():
    assert [CorDA().suits(site(12, 9, kind=kind)) for kind in ("linear", "conv", "embedding", "bare")] == [True, True, False, False]
    assert not CorDA().suits(site(12, role="bias"))


def test_counts():
    assert CorDA().count(site(768, 768)) == 12_288
    assert trainables(CorDA(rank=3), site(4, 2, 3, 3)) == CorDA(rank=3).count(site(4, 2, 3, 3)) == 66


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "both"}, "mode: 'both' is not one of instruction_previewed, knowledge_preserved"),
        ({"damping": 0.0}, "damping: 0.0 is not positive"),
        ({"alpha": 0.0}, "alpha: 0.0"),
        ({"rank": 0}, "rank: 0"),
        ({"scaling": "x"}, "scaling"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        CorDA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        CorDA(rank=10).adapter(site(12, 9), None)
