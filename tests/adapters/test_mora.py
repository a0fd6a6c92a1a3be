"""MoRA: what compresses and expands, entry by entry and on inputs, and the rank for LoRA's number of parameters."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.mora import MoRA
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def by_hand(adapter, x, out):
    """The layer's branch as the paper runs it: add the chunks of the inputs, multiply, repeat the outputs."""
    q = adapter.M.shape[0]
    inputs = list(x.unbind(-1))
    while len(inputs) % q:
        inputs.append(inputs[len(inputs) - x.shape[-1]])  # from the front
    compressed = torch.stack([sum(inputs[k::q]) for k in range(q)], -1)
    low = compressed @ adapter.M.mT
    return torch.cat([low] * (out // q + 1), -1)[..., :out].detach()


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    assert torch.equal(started(MoRA(rank=2), W).weight(W), W)


@pytest.mark.parametrize("rank", [1, 2, 3, 9])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (30, 20), (20, 40)])
def test_the_formula_on_inputs(shape, rank):
    W, x = weight64(*shape), torch.randn(5, shape[1]).double()
    adapter = moved(MoRA(rank=rank), W)
    torch.testing.assert_close(x @ delta(adapter, W).mT, by_hand(adapter, x, shape[0]), rtol=0, atol=1e-10)


def test_entries_where_the_sides_divide():
    """q = 6 on 12 x 24 at r = 1: M tiled 2 x 4 times."""
    W = weight64(12, 24)
    adapter = moved(MoRA(rank=1), W)
    assert adapter.M.shape == (6, 6)
    torch.testing.assert_close(delta(adapter, W), adapter.M.detach().repeat(2, 4), **EXACT)


def test_entries_where_the_inputs_wrap_around():
    """q = 5 on 12 x 9 at r = 1: ten places for nine inputs, so input 0 is also in place 9."""
    W = weight64(12, 9)
    adapter = moved(MoRA(rank=1), W)
    M, D = adapter.M.detach(), delta(adapter, W)
    assert M.shape == (5, 5)
    for o in range(12):
        for i in range(9):
            expected = M[o % 5, i % 5] + (M[o % 5, 4] if i == 0 else 0)
            assert float(D[o, i]) == pytest.approx(float(expected), abs=1e-12)


def test_the_factored_form_where_it_is_thin():
    W = weight64(30, 20)
    adapter = moved(MoRA(rank=2), W)
    form = adapter.factored(W)
    assert form.B.shape == (30, 10)
    torch.testing.assert_close(form.B @ form.A, adapter.weight(W) - W, **EXACT)
    assert not form.A.requires_grad
    assert moved(MoRA(rank=3), W).factored(W) is None


def test_gradient_sums_over_all_places_of_an_entry():
    W, G = weight64(12, 24), weight64(12, 24)
    found = gradients(moved(MoRA(rank=1), W), W, G)
    torch.testing.assert_close(found["M"], G.view(2, 6, 4, 6).sum((0, 2)), **EXACT)


def test_far_more_rank_than_lora_for_about_its_numbers():
    W, each = weight64(48, 48), site(48, 48)
    mora, lora = MoRA(rank=3), LoRA(rank=3)
    assert abs(mora.count(each) / lora.count(each) - 1) < 0.05
    assert torch.linalg.matrix_rank(delta(moved(mora, W), W)) == 17
    assert torch.linalg.matrix_rank(delta(moved(lora, W), W)) == 3


@pytest.mark.parametrize("shape, rank, size", [((768, 768), 8, 111), ((384, 384), 8, 78), ((1536, 384), 8, 124), ((4, 1, 3, 3), 2, 4)])
def test_the_size_of_the_matrix(shape, rank, size):
    """The last would be 5 on a depthwise kernel of 4 x 9, where only four rows can be in use."""
    assert MoRA(rank=rank).adapter(site(*shape), None).M.shape == (size, size)


def test_counts():
    """12,321 for 768 x 768 at r = 8."""
    assert MoRA(rank=8).count(site(768, 768)) == 12_321
    assert count(MoRA(rank=2), clip_vit_b16()) == 36 * 55**2 + 36 * 45**2
    assert trainables(MoRA(rank=2), site(4, 2, 3, 3)) == MoRA(rank=2).count(site(4, 2, 3, 3)) == 16
    assert set(started(MoRA(rank=2), weight64()).state_dict()) == {"M"}


@pytest.mark.parametrize("rank", [0, -1])
def test_bad_options(rank):
    with pytest.raises(UserError, match=f"adapter.method.rank: {rank} is not positive"):
        MoRA(rank=rank)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        MoRA(rank=10).adapter(site(12, 9), None)
