"""MELoRA: blocks on the diagonal and nothing beside them, LoRA for one block, and sides that do not divide."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.melora import MELoRA
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 8)
    assert torch.equal(started(MELoRA(rank=4), W).weight(W), W)


def test_one_mini_is_lora():
    W = weight64()
    ours, lora = moved(MELoRA(rank=3, minis=1, alpha=2.0), W), started(LoRA(rank=3, alpha=2.0), W)
    assert torch.equal(started(MELoRA(rank=3, minis=1), W).A[0], lora.A)
    with torch.no_grad():
        lora.A.copy_(ours.A[0]), lora.B.copy_(ours.B[0])
    torch.testing.assert_close(ours.weight(W), lora.weight(W), **EXACT)


@pytest.mark.parametrize("minis", [2, 4])
def test_the_formula_block_by_block(minis):
    W = weight64(12, 8)
    adapter = moved(MELoRA(rank=4, minis=minis, alpha=3.0), W)
    D, expected = delta(adapter, W), torch.zeros(12, 8).double()
    rows, columns = 12 // minis, 8 // minis
    for i in range(minis):
        block = slice(i * rows, (i + 1) * rows), slice(i * columns, (i + 1) * columns)
        expected[block] = 3 / 4 * (adapter.B[i] @ adapter.A[i]).detach()
    torch.testing.assert_close(D, expected, **EXACT)


def test_the_ranks_of_the_minis_add_up():
    """Rank 4 for the numbers of a LoRA of rank 1."""
    W = weight64(12, 8)
    method = MELoRA(rank=4, minis=4)
    assert torch.linalg.matrix_rank(delta(moved(method, W), W)) == 4
    assert method.count(site(12, 8)) == LoRA(rank=1).count(site(12, 8)) == 20


def test_gradients_read_the_diagonal_blocks_alone():
    W, G = weight64(12, 8), weight64(12, 8)
    adapter = moved(MELoRA(rank=4, minis=2, alpha=4.0), W)
    found = gradients(adapter, W, G)
    for i in range(2):
        block = G[6 * i : 6 * i + 6, 4 * i : 4 * i + 4]
        torch.testing.assert_close(found["B"][i], block @ adapter.A[i].mT, **EXACT)
        torch.testing.assert_close(found["A"][i], adapter.B[i].mT @ block, **EXACT)


def test_the_start_looks_at_the_inputs_of_a_mini():
    A = started(MELoRA(rank=8, minis=4), torch.randn(64, 400)).A.detach()
    assert 0.95 / 10 < A.abs().max() <= 1 / 10


@pytest.mark.parametrize(
    "shape, rank, minis, blocks",
    [
        ((12, 8), 4, 4, 4),
        ((12, 10), 4, 4, 2),
        ((12, 9), 4, 4, 1),
        ((12, 9), 6, 6, 3),
        ((8, 4, 3, 3), 4, 4, 4),  # 8 x 36
        ((4, 1, 3, 3), 4, 2, 1),  # depthwise, 4 x 9
    ],
)
def test_as_many_minis_as_divide_both_sides(shape, rank, minis, blocks):
    method, each = MELoRA(rank=rank, minis=minis), site(*shape)
    adapter = method.adapter(each, None)
    assert adapter.A.shape[:2] == (blocks, rank // blocks)
    assert trainables(method, each) == method.count(each) == rank * sum(each.matrix_shape) // blocks


def test_counts():
    """6,144 for 768 x 768 with two minis at a total rank of 8."""
    assert MELoRA(rank=8, minis=2).count(site(768, 768)) == 6_144
    assert count(MELoRA(rank=2, minis=2), clip_vit_b16()) == 92_160


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 8, "minis": 3}, "minis: 3 does not divide the rank 8"),
        ({"minis": 0}, "minis: 0"),
        ({"rank": 0}, "rank: 0"),
        ({"scaling": "no"}, "scaling: 'no'"),
        ({"dropout": 1.0}, "dropout: 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        MELoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        MELoRA(rank=10).adapter(site(12, 9), None)
