"""Block-LoRA: the stacked LoRA it is, arms that never part, and the counts of the protocol."""

from __future__ import annotations

import pytest
import torch
from fakes import clip_vit_b16, count, delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.block_lora import BlockLoRA
from vision_peft.adapters.lora import LoRA
from vision_peft.engine.install import attach
from vision_peft.errors import UserError


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    assert torch.equal(started(BlockLoRA(rank=4, blocks=2), W).weight(W), W)


def test_one_block_is_lora_with_the_same_scale():
    W = weight64()
    block, lora = moved(BlockLoRA(rank=3, blocks=1), W), started(LoRA(rank=3, alpha=1.0, scaling="sqrt_rank"), W)
    assert torch.equal(started(BlockLoRA(rank=3, blocks=1), W).A, lora.A)
    with torch.no_grad():
        lora.A.copy_(block.A), lora.B.copy_(block.arms[0])
    torch.testing.assert_close(block.weight(W), lora.weight(W), rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank, blocks", [(2, 2), (6, 3), (8, 2)])
def test_it_is_the_stacked_lora_of_rank_r_over_n(rank, blocks):
    """delta = s [B_1 | ... | B_N] [A_s; ...; A_s], with the nominal r in s."""
    W = weight64()
    adapter = moved(BlockLoRA(rank=rank, blocks=blocks, alpha=3.0), W)
    B, A = torch.cat(list(adapter.arms), 1), torch.cat([adapter.A] * blocks)
    assert B.shape == (12, rank) and A.shape == (rank, 9)
    torch.testing.assert_close(delta(adapter, W), 3 / rank**0.5 * B @ A, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(delta(adapter, W)) == rank // blocks


def test_gradients():
    """The same matrix for every arm, s G A_s^T; dL/dA_s = s (sum of arms)^T G."""
    W, G = weight64(), weight64()
    adapter, s = moved(BlockLoRA(rank=6, blocks=3), W), 1 / 6**0.5
    found = gradients(adapter, W, G)
    for arm in found["arms"]:
        torch.testing.assert_close(arm, s * G @ adapter.A.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["A"], s * adapter.arms.sum(0).mT @ G, rtol=0, atol=1e-12)


def test_arms_stay_equal_while_training():
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 4))
    adapters = attach(network, BlockLoRA(rank=4, blocks=4, dropout=0.0), "all")
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.01)
    x, target = torch.randn(16, 9), torch.randn(16, 4)
    for _ in range(10):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        optimizer.step()
    arms = adapters.adapters["0"].arms.detach()
    assert arms.any()
    assert all(torch.equal(arm, arms[0]) for arm in arms)


def test_the_first_adam_step_moves_the_product_as_far_as_n_loras():
    W, G = weight64(), weight64()
    steps = {}
    for blocks in (1, 4):
        adapter = started(BlockLoRA(rank=blocks, blocks=blocks, alpha=blocks**0.5), W)  # s = 1, width 1
        optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-3)
        gradients(adapter, W, G)
        optimizer.step()
        steps[blocks] = adapter.arms.detach().sum(0)
    torch.testing.assert_close(steps[4], 4 * steps[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "rank, blocks, clip, square", [(2, 2, 138_240, 2_304), (4, 4, 230_400, 3_840), (8, 8, 414_720, 6_912), (2, 1, 184_320, 3_072)]
)
def test_counts(rank, blocks, clip, square):
    method = BlockLoRA(rank=rank, blocks=blocks)
    assert count(method, clip_vit_b16()) == clip
    assert method.count(site(768, 768)) == square
    assert trainables(method, site(12, 9)) == method.count(site(12, 9))
    assert method.count(site(768, 768)) / LoRA(rank=rank).count(site(768, 768)) == (1 + 1 / blocks) / 2


def test_a_nominal_rank_above_the_matrix_is_fine_as_long_as_the_width_fits():
    adapter = started(BlockLoRA(rank=16, blocks=8), weight64())
    assert adapter.A.shape == (2, 9)
    with pytest.raises(UserError, match="does not fit"):
        BlockLoRA(rank=30, blocks=3).adapter(site(12, 9), None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 3, "blocks": 2}, "blocks: 2 does not divide the rank 3"),
        ({"blocks": 0}, "blocks: 0"),
        ({"rank": 0, "blocks": 2}, "rank: 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"scaling": "?"}, "scaling"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        BlockLoRA(**options)
