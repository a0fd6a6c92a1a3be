"""factored_linear against autograd of the plain formula in float64; what it saves; what half precision keeps of small updates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vision_peft.engine.adapter import Factored
from vision_peft.engine.factored import factored_linear, stack_rows
from vision_peft.linalg.dropout import dropout

OUT, IN, RANK = 9, 7, 3


def make(scale: bool = True, bias: bool = True, dropout: float = 0.0, out: int = OUT) -> tuple[Tensor, Tensor, Tensor | None, Factored]:
    x, W, b = torch.randn(4, 5, IN), torch.randn(out, IN), torch.randn(out) if bias else None
    form = Factored(torch.randn(out, RANK), torch.randn(RANK, IN), torch.rand(out) + 0.5 if scale else None, dropout)
    return x, W, b, form


def whole(form: Factored) -> list[tuple[tuple[int, int], Factored]]:
    return [((0, form.B.shape[0]), form)]


def plain(x: Tensor, W: Tensor, b: Tensor | None, form: Factored) -> Tensor:
    """The formula, densely, in float64."""
    merged = W.double() + form.B @ form.A
    return F.linear(x, merged if form.scale is None else form.scale[:, None] * merged, None if b is None else b.double())


def gradients_of(function, x, W, b, form, dtype) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {"x": x, "b": b, "B": form.B, "A": form.A, "scale": form.scale}
    leaves = {key: value.detach().to(dtype).requires_grad_() for key, value in leaves.items() if value is not None}
    own = Factored(leaves["B"], leaves["A"], leaves.get("scale"), form.dropout)
    y = function(leaves["x"], W, leaves.get("b"), own)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    (y * direction).sum().backward()
    return y.detach(), {key: value.grad for key, value in leaves.items()}


def assert_matches_float64(x, W, b, form, rtol=1e-4, atol=1e-5):
    ours = gradients_of(lambda x, W, b, form: factored_linear(x, W, b, whole(form), True), x, W, b, form, torch.float32)
    reference = gradients_of(plain, x, W, b, form, torch.float64)
    torch.testing.assert_close(ours[0].double(), reference[0], rtol=rtol, atol=atol)
    assert ours[1].keys() == reference[1].keys()
    for key, gradient in ours[1].items():
        torch.testing.assert_close(gradient.double(), reference[1][key], rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_merged_path_and_its_gradients(scale, bias):
    assert_matches_float64(*make(scale, bias))


@pytest.mark.parametrize("value", [0.0, 1e-6, 1e-3, -2.0])
def test_gradient_of_scale_where_scale_is_small_or_zero(value):
    x, W, b, form = make()
    scale = form.scale.clone()
    scale[2:5] = value
    assert_matches_float64(x, W, b, form._replace(scale=scale))


def test_gradient_of_scale_is_not_drowned_by_a_large_bias():
    x, W, b, form = make()
    assert_matches_float64(x, W, 1e4 * b, form._replace(scale=0.01 * form.scale), rtol=1e-4, atol=2e-3)


def test_gradient_of_scale_is_exactly_zero_where_the_row_is():
    x, W, b, form = make()
    W[3], B = 0, form.B.clone()
    B[3] = 0
    scale = form.scale.clone().requires_grad_()
    (factored_linear(x, W, b, whole(form._replace(B=B, scale=scale)), True) * torch.randn(4, 5, OUT)).sum().backward()
    assert scale.grad[3] == 0
    assert scale.grad[[0, 1, 2, 4]].all()


def test_output_may_be_overwritten_in_place():
    """nn.Linear followed by ReLU(inplace=True): the output is not kept for the backward pass."""
    x, W, b, form = make()
    results = []
    for activation in (torch.relu, torch.relu_):
        results.append(
            gradients_of(lambda x, W, b, form, f=activation: f(factored_linear(x, W, b, whole(form), True)), x, W, b, form, torch.float32)
        )
    assert torch.equal(results[0][0], results[1][0])
    for key, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][key]), key


def test_frozen_factors_get_no_gradient_and_no_work():
    x, W, b, form = make()
    A = form.A.clone().requires_grad_()
    y = factored_linear(x, W, b, whole(form._replace(A=A)), True)
    y.sum().backward()
    assert A.grad is not None
    assert all(tensor.grad is None for tensor in (x, W, b, form.B, form.scale))


@pytest.mark.parametrize("scale", [True, False])
def test_no_dense_gradient_and_no_second_copy_of_the_weight_are_kept(scale):
    """Of tensors the size of W (out, in), the backward pass may keep W itself, and nothing else."""
    out, columns = 96, 64  # larger than any thin tensor here
    x, W = torch.randn(2, columns), torch.randn(out, columns)
    B, A, mu = torch.randn(out, 2), torch.randn(2, columns), torch.ones(out)
    form = Factored(B.requires_grad_(), A.requires_grad_(), mu.requires_grad_() if scale else None)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        y = factored_linear(x.requires_grad_(), W, None, whole(form), True)
    big = [tensor for tensor in kept if tensor.numel() >= W.numel()]
    assert big
    assert all(tensor.data_ptr() == W.data_ptr() for tensor in big)
    y.sum().backward()
    assert W.grad is None
    assert all(leaf.grad is not None for leaf in (x, B, A))


def test_vectors_and_leading_dimensions():
    x, W, b, form = make()
    y = factored_linear(x, W, b, whole(form), False)
    assert torch.equal(factored_linear(x.view(2, 2, 5, IN), W, b, whole(form), False), y.view(2, 2, 5, OUT))
    torch.testing.assert_close(factored_linear(x[0, 0], W, b, whole(form), False), y[0, 0])


# row blocks


@pytest.mark.parametrize("scaled", [(), (0,), (0, 1)])
def test_stack_rows_is_the_blocks_side_by_side(scaled):
    """Blocks of different rank, given out of order, with a gap between (k is missing)."""
    q, v = make(scale=0 in scaled, out=3)[3], make(scale=1 in scaled, out=3)[3]
    v = Factored(v.B[:, :2], v.A[:2], v.scale)
    W, rows = torch.randn(OUT, IN), {"q": slice(0, 3), "k": slice(3, 6), "v": slice(6, 9)}
    form = stack_rows([((6, 9), v), ((0, 3), q)], OUT)
    merged = W + form.B @ form.A
    merged = merged if form.scale is None else form.scale[:, None] * merged
    assert (form.scale is None) == (not scaled)
    for block, own in (("q", q), ("v", v)):
        expected = W[rows[block]] + own.B @ own.A
        torch.testing.assert_close(merged[rows[block]], expected if own.scale is None else own.scale[:, None] * expected)
    assert torch.equal(merged[rows["k"]], W[rows["k"]])


def test_gradients_reach_every_block():
    q, v = make(scale=True, out=3)[3], make(scale=False, out=3)[3]
    x, W, b, _ = make()
    leaves = [tensor.requires_grad_() for tensor in (q.B, q.A, q.scale, v.B, v.A)]
    (factored_linear(x, W, b, [((0, 3), q), ((6, 9), v)], True) * (direction := torch.randn(4, 5, OUT))).sum().backward()
    ours = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    dense = torch.cat([q.scale[:, None] * (W[:3] + q.B @ q.A), W[3:6], W[6:] + v.B @ v.A])
    (F.linear(x, dense, b) * direction).sum().backward()
    for mine, leaf in zip(ours, leaves):
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-4, atol=1e-5)


# dropout: the side path


def test_dropout_acts_on_the_branch_alone_and_in_training_alone():
    x, W, b, form = make(scale=True, dropout=0.5)
    merged = form.scale[:, None] * (W + form.B @ form.A)
    torch.testing.assert_close(factored_linear(x, W, b, whole(form), False), F.linear(x, merged, b), rtol=1e-5, atol=1e-5)
    torch.manual_seed(4)
    y = factored_linear(x, W, b, whole(form), True)
    torch.manual_seed(4)
    dropped = dropout(x, 0.5, training=True)
    torch.testing.assert_close(y, form.scale * (F.linear(x, W) + dropped @ form.A.mT @ form.B.mT) + b)
    assert not torch.equal(y, factored_linear(x, W, b, whole(form), False))


def test_every_block_drops_by_itself():
    """CLIP-LoRA's q, k, v have a dropout module each: independent masks, here also of different rates."""
    x, W = torch.ones(2000, 1), torch.zeros(2, 1)
    one = torch.ones(1, 1)
    y = factored_linear(x, W, None, [((0, 1), Factored(one, one, None, 0.5)), ((1, 2), Factored(one, one, None, 0.2))], True)
    dropped = (y == 0).float()
    assert abs(dropped[:, 0].mean() - 0.5) < 0.06
    assert abs(dropped[:, 1].mean() - 0.2) < 0.06
    assert abs((dropped[:, 0] * dropped[:, 1]).mean() - 0.1) < 0.04


# half precision


def test_autocast_merges_in_float32_and_rounds_once():
    x, W, b, form = make(scale=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = factored_linear(x, W, b, whole(form), False)
        expected = F.linear(x, W + (form.B.double() @ form.A.double()).float(), b)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max()


def test_autocast_gradients_are_float32_and_close():
    x, W, b, form = make()

    def cast(x, W, b, form):
        with torch.autocast("cpu", torch.bfloat16):
            return factored_linear(x, W, b, whole(form), True)

    _, ours = gradients_of(cast, x, W, b, form, torch.float32)
    _, reference = gradients_of(plain, x, W, b, form, torch.float64)
    for key, gradient in ours.items():
        assert gradient.dtype == torch.float32
        assert (gradient - reference[key]).norm() <= 0.02 * reference[key].norm(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [True, False])
def test_side_path_gradients(scale, dtype):
    """The side path, here taken because W is stored in half precision, and its gradients in x, B, A, scale and bias."""
    x, W, b, form = make(scale)
    W = W.bfloat16()
    _, ours = gradients_of(
        lambda x, W, b, form: factored_linear(x.to(dtype), W.to(dtype), b, _dropping(form, dtype), True), x, W, b, form, torch.float32
    )
    _, reference = gradients_of(plain, x, W, b, form, torch.float64)
    for key, gradient in ours.items():
        assert (gradient - reference[key]).norm() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * reference[key].norm(), key


def _dropping(form: Factored, dtype: torch.dtype) -> list[tuple[tuple[int, int], Factored]]:
    """Float32 weights take the side path with dropout only: so little of it that nothing is dropped."""
    return whole(form if dtype == torch.bfloat16 else form._replace(dropout=1e-9))


@pytest.mark.parametrize("scale, dropout", [(True, 0.0), (True, 0.5), (False, 0.5)])
def test_output_type_under_autocast_is_that_of_a_plain_linear(scale, dropout):
    x, W, b, form = make(scale, dropout=dropout)
    with torch.autocast("cpu", torch.bfloat16):
        assert factored_linear(x, W, b, whole(form), True).dtype == F.linear(x, W, b).dtype == torch.bfloat16


def share_kept(changed: Tensor, unchanged: Tensor, true_change: Tensor) -> float:
    """How far the output moved along the change that exact arithmetic gives: 1 is all of it."""
    moved = (changed.double() - unchanged.double()).flatten()
    return float(moved @ true_change.flatten() / true_change.flatten().square().sum())


def test_small_updates_of_bf16_weights_survive_on_the_side_path():
    """Relative size 0.03 %: all of it arrives, where rounding W + D onto W's grid keeps a fifth."""
    x, W = torch.randn(512, 128).bfloat16(), torch.randn(256, 128).bfloat16()
    B, A = torch.randn(256, 4), torch.randn(4, 128)
    B = B * (3e-4 * W.float().norm() / (B @ A).norm())
    true_change = x.double() @ (B.double() @ A.double()).mT
    frozen = F.linear(x, W)
    side = share_kept(factored_linear(x, W, None, whole(Factored(B, A)), True), frozen, true_change)
    rounded = share_kept(F.linear(x.float(), (W + B @ A).bfloat16().float()), F.linear(x.float(), W.float()), true_change)
    assert 0.9 < side < 1.1
    assert rounded < 0.35


def test_small_changes_of_the_scale_survive_under_autocast():
    """The scale is merged before rounding; a product rounded first and scaled by 1.0003 afterwards would be what it was."""
    x, W = torch.randn(512, 128), torch.randn(256, 128)
    form = Factored(torch.zeros(256, 1), torch.zeros(1, 128), torch.full((256,), 1.0003).requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        y, frozen = factored_linear(x, W, None, whole(form), True), F.linear(x, W)
    assert 0.8 < share_kept(y.detach(), frozen, 3e-4 * (x.double() @ W.double().mT)) < 1.2


def test_the_branch_is_added_before_rounding_with_dropout_under_autocast_too():
    x, W = torch.randn(512, 128).bfloat16().float(), torch.randn(256, 128).bfloat16().float()
    B, A = torch.randn(256, 4), torch.randn(4, 128)
    B = B * (3e-4 * W.norm() / (B @ A).norm())
    torch.manual_seed(4)
    true_change = dropout(x, 0.25, training=True).double() @ (B.double() @ A.double()).mT
    torch.manual_seed(4)
    with torch.autocast("cpu", torch.bfloat16):
        y, frozen = factored_linear(x, W, None, whole(Factored(B, A, None, 0.25)), True), F.linear(x, W)
    assert 0.9 < share_kept(y, frozen, true_change) < 1.1


def test_one_percent_of_scale_arrives_whole_on_the_side_path():
    """A magnitude of 1.01 rounded to bfloat16 would be 1.0078."""
    x, W = torch.randn(512, 128).bfloat16(), torch.randn(256, 128).bfloat16()
    form = Factored(torch.zeros(256, 1), torch.zeros(1, 128), torch.full((256,), 1.01))
    true_change = 0.01 * (x.double() @ W.double().mT)
    y = factored_linear(x, W, None, whole(form), True)
    assert y.dtype == torch.bfloat16
    assert 0.9 < share_kept(y, F.linear(x, W), true_change) < 1.1
