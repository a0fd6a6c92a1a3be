"""PRoLoRA: the factors rebuilt copy by copy, LoRA as a special case, the rectified start."""

from __future__ import annotations

import math

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.prolora import ProLoRA
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-12}


def factors(adapter, m, n, p, q):
    """A and B assembled copy by copy; copy i has its ranks turned i steps."""
    common = adapter.A_c.shape[0]
    step_in, step_out = max(1, common // p), max(1, common // q)
    A = torch.cat([torch.roll(adapter.A_c, -i * step_in, dims=0) for i in range(p)], dim=1)[:, :n]
    B = torch.cat([torch.roll(adapter.B_c, -i * step_out, dims=1) for i in range(q)], dim=0)[:m]
    if adapter.A_u is not None:
        A, B = torch.cat([adapter.A_u, A]), torch.cat([adapter.B_u, B], dim=1)
    return A.detach(), B.detach()


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    assert torch.equal(started(ProLoRA(), W).weight(W), W)


@pytest.mark.parametrize("unshared", [0, 1, 2])
@pytest.mark.parametrize("p, q", [(1, 1), (3, 4), (2, 5), (4, 2)])
def test_the_formula(unshared, p, q):
    """Also where 12 rows or 9 columns are no multiple of the copies."""
    W = weight64()
    adapter = moved(ProLoRA(rank=6, unshared_rank=unshared, repeats_in=p, repeats_out=q, alpha=2.0), W)
    A, B = factors(adapter, 12, 9, p, q)
    torch.testing.assert_close(delta(adapter, W), 2 / 6 * B @ A, **EXACT)


def test_one_copy_without_shared_parts_is_lora():
    W = weight64()
    ours = moved(ProLoRA(rank=3, unshared_rank=0, repeats_in=1, repeats_out=1, alpha=2.0), W)
    lora = started(LoRA(rank=3, alpha=2.0), W)
    assert torch.equal(started(ProLoRA(rank=3, unshared_rank=0, repeats_in=1, repeats_out=1), W).A_c, lora.A)
    with torch.no_grad():
        lora.A.copy_(ours.A_c), lora.B.copy_(ours.B_c)
    torch.testing.assert_close(ours.weight(W), lora.weight(W), **EXACT)


def test_rotation_makes_the_blocks_differ():
    """Without it all blocks of the shared part would be one block; with it (2 x 2 copies of 4 ranks, steps of 2) two kinds."""
    W = weight64(12, 8)
    D = delta(moved(ProLoRA(rank=4, unshared_rank=0, repeats_in=2, repeats_out=2), W), W)
    blocks = D.view(2, 6, 2, 4).transpose(1, 2)
    torch.testing.assert_close(blocks[0, 0], blocks[1, 1], **EXACT)
    torch.testing.assert_close(blocks[0, 1], blocks[1, 0], **EXACT)
    assert (blocks[0, 0] - blocks[0, 1]).abs().max() > 0.1


def test_the_change_has_the_full_nominal_rank():
    W = weight64(24, 20)
    assert torch.linalg.matrix_rank(delta(moved(ProLoRA(rank=8), W), W)) == 8


def test_the_start_is_rectified():
    """The bound is that of the whole width, not of a chunk, so that A x has the size it has in LoRA."""
    adapter = started(ProLoRA(rank=8, unshared_rank=2, repeats_in=4), torch.zeros(8, 400, dtype=torch.float64))
    for down in (adapter.A_c, adapter.A_u):
        assert down.abs().max() <= 1 / math.sqrt(400)
        assert abs(float(down.detach().var()) * 3 * 400 - 1) < 0.15
    assert not adapter.B_c.any()
    assert not adapter.B_u.any()


def test_a_chunk_learns_from_all_its_copies():
    W, G = weight64(), weight64()
    adapter = moved(ProLoRA(rank=6, unshared_rank=2, repeats_in=3, repeats_out=4, alpha=6.0), W)
    found = gradients(adapter, W, G)
    A, B = factors(adapter, 12, 9, 3, 4)
    gA, gB = (B.mT @ G)[2:], (G @ A.mT)[:, 2:]  # of the assembled shared parts, (4, 9) and (12, 4)
    torch.testing.assert_close(found["A_c"], sum(torch.roll(gA[:, 3 * i : 3 * i + 3], i, 0) for i in range(3)), **EXACT)
    torch.testing.assert_close(found["B_c"], sum(torch.roll(gB[3 * i : 3 * i + 3], i, 1) for i in range(4)), **EXACT)
    torch.testing.assert_close(found["A_u"], (B.mT @ G)[:2], **EXACT)


def test_counts():
    """768 x 768, r = 8, u = 2, four copies each: 2 * 1,536 + 6 * 384 = 5,376 against LoRA's 12,288."""
    assert ProLoRA().count(site(768, 768)) == 5_376
    assert ProLoRA(unshared_rank=0, repeats_in=1, repeats_out=1).count(site(768, 768)) == 12_288
    for shape in ((12, 9), (8, 2, 3, 3), (13, 11)):
        for unshared in (0, 2):
            method = ProLoRA(rank=5, unshared_rank=unshared, repeats_in=4, repeats_out=3)
            assert trainables(method, site(*shape)) == method.count(site(*shape))


def test_only_trained_tensors_are_saved():
    assert set(started(ProLoRA(), weight64()).state_dict()) == {"A_c", "B_c", "A_u", "B_u"}
    assert set(started(ProLoRA(unshared_rank=0), weight64()).state_dict()) == {"A_c", "B_c"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"unshared_rank": -1}, "unshared_rank: -1 is not between 0 and rank - 1 = 7"),
        ({"unshared_rank": 8}, "unshared_rank: 8"),
        ({"repeats_in": 0}, "repeats_in: 0 is not positive"),
        ({"repeats_out": 0}, "repeats_out: 0 is not positive"),
        ({"rank": 0}, "rank: 0"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        ProLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        ProLoRA(rank=10).adapter(site(12, 9), None)
