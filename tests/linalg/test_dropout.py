"""Dropout by 16 bits an entry: the share, the mean, independence of neighbours, gradients, the generator."""

from __future__ import annotations

import pytest
import torch

from vision_peft.linalg.dropout import dropout


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_scale_and_gradient(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(401, 503, dtype=dtype, requires_grad=True)
    y = dropout(x, p, training=True)
    dropped = y == 0
    assert dropped.double().mean() == pytest.approx(p, abs=4e-3)  # five standard deviations of 200 thousand draws
    assert y[~dropped].unique().tolist() == pytest.approx([1 / (1 - p)], rel=4e-3)
    y.backward(torch.full_like(y, 2.0))
    torch.testing.assert_close(x.grad, 2 * y.detach())
    for step in (1, 2, 3, 4, 503):  # four entries share a word, and rows follow each other
        flat = dropped.double().flatten() - p
        assert abs((flat[step:] * flat[:-step]).mean()) < 4e-3


def test_it_is_off_outside_training_and_follows_the_global_seed():
    x = torch.randn(64)
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0, training=True) is not None
    torch.manual_seed(1)
    first = dropout(x, 0.5, training=True)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(x, 0.5, training=True))
    assert not torch.equal(first, dropout(x, 0.5, training=True))
    assert torch.equal(dropout(x, 1.0, training=True), torch.zeros(64))
