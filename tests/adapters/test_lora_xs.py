"""LoRA-XS: r^2 numbers in the singular basis of the weight."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64

from vision_peft.adapters import lora_xs
from vision_peft.adapters.lora_xs import LoRAXS
from vision_peft.errors import UserError


def svd(W, r):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10)])
def test_the_frozen_pair_is_the_truncated_svd(shape):
    """B A is the best approximation of rank r; B is orthonormal, A carries the singular values."""
    W = weight64(*shape)
    adapter = started(LoRAXS(rank=4), W)
    U, S, Vh = svd(W, 4)
    torch.testing.assert_close(adapter.B @ adapter.A, U * S @ Vh, rtol=0, atol=1e-11)
    torch.testing.assert_close(adapter.B.mT @ adapter.B, torch.eye(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(adapter.A @ adapter.A.mT, torch.diag(S.square()), rtol=0, atol=1e-11)


def test_starts_nearly_at_the_identity():
    """|W' - W| < 1e-3 |W|, from R ~ N(0, 1e-5^2) out of the site's generator."""
    W = weight64(40, 30)
    adapter, again, other = (started(LoRAXS(rank=20), W, seed) for seed in (0, 0, 1))
    assert 0 < delta(adapter, W).norm() < 1e-3 * W.norm()
    assert abs(float(adapter.R.detach().std()) / 1e-5 - 1) < 0.1
    assert torch.equal(adapter.R, again.R) and not torch.equal(adapter.R, other.R)
    assert not LoRAXS.identity_at_init
    assert not delta(started(LoRAXS(rank=2, init_std=0.0), W), W).any()


def test_the_formula():
    W = weight64()
    adapter = moved(LoRAXS(rank=4, alpha=6.0), W)
    torch.testing.assert_close(delta(adapter, W), 1.5 * (adapter.B @ adapter.R @ adapter.A).detach(), rtol=0, atol=1e-11)
    assert torch.linalg.matrix_rank(delta(adapter, W)) == 4


def test_gradient_by_hand():
    """dL/dR = s B^T G A^T; only R is trained."""
    W, G = weight64(), weight64()
    adapter = moved(LoRAXS(rank=4, alpha=6.0), W)
    found = gradients(adapter, W, G)
    assert set(found) == {"R"}
    torch.testing.assert_close(found["R"], 1.5 * adapter.B.mT @ G @ adapter.A.mT, rtol=0, atol=1e-11)


def test_the_factored_form_leaves_no_gradient_to_the_frozen_factor():
    adapter = moved(LoRAXS(rank=4), weight64())
    form = adapter.factored(weight64())
    assert form.B.requires_grad and not form.A.requires_grad


def flipped(monkeypatch, signs):
    """Another decomposition of the same weight, as another machine may find it."""

    def decompose(W):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U * signs, S, Vh * signs[:, None]

    monkeypatch.setattr(lora_xs, "cached_svd", decompose)


def test_signs_of_the_decomposition_do_not_matter(monkeypatch):
    """R is saved alone, and means the same on a machine that finds other signs."""
    W = weight64()
    adapter = moved(LoRAXS(rank=4), W)
    flipped(monkeypatch, torch.tensor([1.0, -1, -1, 1, -1, 1, 1, -1, 1]).double())
    other = started(LoRAXS(rank=4), W)
    other.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(delta(other, W), delta(adapter, W), rtol=0, atol=1e-11)
    torch.testing.assert_close(other.fingerprint(), adapter.fingerprint(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pair", range(4))
def test_the_mark_sees_the_sign_of_a_pair(pair):
    """A flipped pair changes what the entries of R off the diagonal do."""
    W = weight64(30, 20)
    adapter = moved(LoRAXS(rank=4), W)
    mark, before = adapter.fingerprint(), delta(adapter, W)
    adapter.B[:, pair] *= -1
    adapter.A[pair] *= -1
    assert (delta(adapter, W) - before).abs().max() > 0.1
    assert not torch.allclose(adapter.fingerprint(), mark, rtol=1e-3, atol=1e-4)


def test_the_mark_tells_weights_and_ranks_apart():
    W = weight64()
    mark = started(LoRAXS(rank=4), W).fingerprint()
    for other in (started(LoRAXS(rank=5), W), started(LoRAXS(rank=4), W + 0.1 * weight64()), started(LoRAXS(rank=4), W.flip(1))):
        assert not torch.allclose(other.fingerprint(), mark, rtol=1e-3, atol=1e-4)


def test_counts():
    """r^2: 1,024 at r = 32, whatever the width; six matrices in the 24 blocks of CLIP ViT-B's towers: 147,456. Only R is saved."""
    assert LoRAXS().count(site(768, 768)) == LoRAXS().count(site(3072, 768)) == 1_024
    assert 24 * 6 * LoRAXS().count(site(768, 768)) == 147_456
    assert trainables(LoRAXS(rank=3), site(4, 2, 3, 3)) == LoRAXS(rank=3).count(site(4, 2, 3, 3)) == 9
    assert set(started(LoRAXS(rank=3), weight64()).state_dict()) == {"R"}


@pytest.mark.parametrize(
    "options, message",
    [({"rank": 0}, "rank: 0 is not positive"), ({"init_std": -1e-5}, "init_std: -1e-05 is negative"), ({"dropout": 1.0}, "dropout: 1.0")],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=f"adapter.method.{message}"):
        LoRAXS(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        LoRAXS(rank=10).adapter(site(12, 9), None)
