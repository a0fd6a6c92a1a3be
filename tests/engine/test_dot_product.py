"""softmax(q k^T) v by products, in pieces and by torch's kernel is one function, with one gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vision_peft.engine import dot_product as module
from vision_peft.engine.dot_product import by_products, dot_product, in_pieces


def heads(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    drawn = [torch.randn(2, length, 3, 8).to(dtype) for length in (queries, keys, keys)]
    return [each.transpose(1, 2).requires_grad_() for each in drawn]


def outcome(function, tensors) -> list[torch.Tensor]:
    out = function(*tensors)
    return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]


@pytest.mark.parametrize("function", [by_products, in_pieces])
@pytest.mark.parametrize("queries, keys", [(5, 7), (512, 3), (1100, 40)])
def test_products_and_pieces_are_torchs_attention(function, queries, keys):
    tensors = heads(queries, keys)
    expected = outcome(F.scaled_dot_product_attention, tensors)
    for found, each in zip(outcome(lambda q, k, v: function(q * 8**-0.5, k, v), tensors), expected):
        torch.testing.assert_close(found, each, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("held", [0, 10**9])
def test_bfloat16_is_as_near_to_float32_as_rounded_scores_allow(held, monkeypatch):
    monkeypatch.setattr(module, "HELD", held)
    tensors = heads(600, 300, torch.bfloat16)
    exact = outcome(F.scaled_dot_product_attention, [each.detach().float().requires_grad_() for each in tensors])
    for found, true in zip(outcome(dot_product, tensors), exact):
        assert (found - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_torchs(boolean, dtype):
    tensors = heads(5, 7, dtype)
    mask = torch.randn(2, 3, 1, 7, dtype=dtype)
    if boolean:
        mask = mask > 0.5
        mask[..., 0] = True  # every query sees something
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    torch.testing.assert_close(dot_product(*tensors, mask), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)


def test_under_autocast_pieces_compute_in_the_type_they_are_given():
    tensors = heads(600, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = in_pieces(*tensors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, in_pieces(*tensors), atol=0, rtol=0)
