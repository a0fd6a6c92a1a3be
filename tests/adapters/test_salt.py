"""SALT: the singular value matrix entry by entry, its two starts, the counts of SAM ViT-B, and signs that matter."""

from __future__ import annotations

import pytest
import torch
from fakes import count, delta, gradients, moved, site, started, trainables, weight64

from vision_peft.adapters.salt import SALT
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-10}


def values(adapter):
    """S' (p, p) before ReLU, written out."""
    r, s = adapter.rank, adapter.S
    full = torch.zeros(len(s), len(s), dtype=s.dtype)
    full[:r, :r] = torch.diag(adapter.a * s[:r] + adapter.b)
    full[r:, r:] = torch.diag(s[r:]) + adapter.X @ adapter.Y
    return full.detach()


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_the_formula(shape):
    W = weight64(*shape)
    adapter = moved(SALT(rank=3, tail_rank=2), W)
    full = values(adapter)
    assert (full < 0).any(), "ReLU must have something to do"
    torch.testing.assert_close(adapter.weight(W), adapter.U @ full.clamp(min=0) @ adapter.Vh, **EXACT)


def test_the_basis_is_that_of_the_weight():
    W = weight64()
    adapter = started(SALT(rank=3, tail_rank=2), W)
    torch.testing.assert_close(adapter.U * adapter.S @ adapter.Vh, W, **EXACT)


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    assert torch.equal(started(SALT(rank=3, tail_rank=2), W).weight(W), W)


def test_kaiming_start_of_x():
    X = started(SALT(rank=1, tail_rank=6), weight64(40, 30)).X
    assert 0.9 < X.abs().max() <= 1.0  # sqrt(6 / q) = 1


def test_the_normal_start_is_far_from_the_identity():
    """ReLU(X Y) of 718 x 718 entries at q = 256: mean 6.4e-4, spectral norm 0.46; X Y itself 0.135."""
    method = SALT(rank=2, tail_rank=256, start="normal")
    assert not method.identity_at_init
    assert SALT().identity_at_init
    adapter = started(method, torch.randn(720, 720))
    product = (adapter.X @ adapter.Y).detach()
    assert 5.8e-4 < product.relu().mean() < 7e-4
    assert 0.40 < torch.linalg.matrix_norm(product.relu(), 2) < 0.52
    assert 0.11 < torch.linalg.matrix_norm(product, 2) < 0.16


def test_blocks_do_not_mix():
    W = weight64()
    adapter = moved(SALT(rank=3, tail_rank=2), W)
    core = adapter.U.mT @ adapter.weight(W) @ adapter.Vh.mT
    torch.testing.assert_close(core[:3, 3:], torch.zeros(3, 6).double(), **EXACT)
    torch.testing.assert_close(core[3:, :3], torch.zeros(6, 3).double(), **EXACT)


def test_only_the_product_of_x_and_y_counts():
    W = weight64()
    adapter = moved(SALT(rank=3, tail_rank=2), W)
    before = adapter.weight(W).detach()
    mix = torch.tensor([[2.0, 1], [0, -3]]).double()
    with torch.no_grad():
        adapter.X.copy_(adapter.X @ mix)
        adapter.Y.copy_(torch.linalg.inv(mix) @ adapter.Y)
    torch.testing.assert_close(adapter.weight(W), before, **EXACT)


def test_relu_breaks_the_low_rank():
    W = weight64(30, 24)
    adapter = moved(SALT(rank=1, tail_rank=1), W)
    assert torch.linalg.matrix_rank(delta(adapter, W)) > 3


def test_negative_scaled_values_are_cut_off_and_get_no_gradient():
    W = weight64()
    adapter = started(SALT(rank=3, tail_rank=2), W)
    with torch.no_grad():
        adapter.a[1] = -1
    found = gradients(adapter, W, weight64())
    assert found["a"][1] == 0 == found["b"][1]
    assert found["a"][0] != 0 != found["b"][0]


def test_gradients_at_the_start():
    """da = s u^T G v, db = u^T G v; Y sees the diagonal of the tail's gradient only, X nothing."""
    W, G = weight64(), weight64()
    adapter = started(SALT(rank=3, tail_rank=2), W)
    found = gradients(adapter, W, G)
    core = adapter.U.mT @ G @ adapter.Vh.mT
    torch.testing.assert_close(found["b"], core.diagonal()[:3], **EXACT)
    torch.testing.assert_close(found["a"], adapter.S[:3] * core.diagonal()[:3], **EXACT)
    torch.testing.assert_close(found["Y"], adapter.X.detach().mT @ torch.diag(core.diagonal()[3:]), **EXACT)
    assert not found["X"].any()


def test_all_values_scaled_leaves_no_tail():
    W = weight64()
    adapter = moved(SALT(rank=9), W)
    assert set(adapter.state_dict()) == {"a", "b"}
    expected = adapter.U * (adapter.a * adapter.S + adapter.b).relu() @ adapter.Vh
    torch.testing.assert_close(adapter.weight(W), expected, **EXACT)


def test_the_sign_of_a_pair_matters_and_is_fixed():
    W = weight64()
    adapter = moved(SALT(rank=3, tail_rank=2), W)
    mark, before = adapter.fingerprint(), adapter.weight(W)
    for k in range(3, 9):
        other = moved(SALT(rank=3, tail_rank=2), W)
        other.load_state_dict(adapter.state_dict())
        with torch.no_grad():
            other.U[:, k] *= -1
            other.Vh[k] *= -1
        assert (other.weight(W) - before).abs().max() > 1e-2
        assert not torch.allclose(other.fingerprint(), mark, rtol=1e-3, atol=1e-4)


def test_the_basis_does_not_depend_on_the_signs_of_the_decomposition(monkeypatch):
    from vision_peft.adapters import salt

    W = weight64()
    own, found = started(SALT(rank=3), W), salt.cached_svd(W)
    signs = torch.where(torch.arange(9) % 2 == 0, 1.0, -1.0).double()
    monkeypatch.setattr(salt, "cached_svd", lambda W: found._replace(U=found.U * signs, Vh=found.Vh * signs[:, None]))
    again = started(SALT(rank=3), W)
    assert torch.equal(again.U, own.U)
    assert torch.equal(again.Vh, own.Vh)


def test_the_penalty():
    W = weight64()
    adapter = moved(SALT(rank=3, tail_rank=2, penalty_weight=0.5), W)
    s = adapter.S[:3]
    expected = 0.5 * ((adapter.a * s + adapter.b - s).norm() + (adapter.X @ adapter.Y).norm())
    torch.testing.assert_close(adapter.penalty(), expected)
    assert moved(SALT(rank=3), W).penalty() == 0.0


def test_the_penalty_has_a_finite_gradient_at_the_start():
    adapter = started(SALT(rank=3, tail_rank=2, penalty_weight=0.5), weight64())
    adapter.penalty().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


@pytest.mark.parametrize("q, numbers", [(256, 8_967_112), (4, 179_368)])
def test_counts_of_sam_vit_b(q, numbers):
    """48 linear layers, qkv fused, and both convolutions of the neck."""
    shapes = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.lin1": (3072, 768), "mlp.lin2": (768, 3072)}
    sites = [site(*shape, name=f"blocks.{i}.{name}") for i in range(12) for name, shape in shapes.items()]
    sites += [site(256, 768, 1, 1, name="neck.0"), site(256, 256, 3, 3, name="neck.2")]
    assert count(SALT(ranks={"*attn*": 760, "*mlp*": 50, "*neck*": 250}, tail_rank=q), sites) == numbers


def test_counts():
    assert SALT(ratio=0.1).rank_of(site(48, 30)) == 3
    assert SALT(ratio=0.1).rank_of(site(4, 9)) == 1
    assert SALT(rank=2, ranks={"vision.1.*": 5}).rank_of(site(12, 9, name="vision.0.attn.q")) == 2
    for method in (SALT(), SALT(rank=3, tail_rank=4), SALT(rank=9)):
        assert trainables(method, site(12, 9)) == method.count(site(12, 9))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 0.0}, "ratio: 0.0"),
        ({"ratio": 1.5}, "ratio: 1.5"),
        ({"tail_rank": 0}, "tail_rank: 0"),
        ({"start": "ones"}, "start: 'ones' is not one of zero, normal"),
        ({"penalty_weight": -1.0}, "penalty_weight: -1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        SALT(**options)


@pytest.mark.parametrize(
    "options, message", [({"rank": 10}, "rank: 10"), ({"rank": 0}, "rank: 0"), ({"ranks": {"*q": 99}}, r"ranks.\*q: 99")]
)
def test_ranks_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=f"{message} does not fit vision.0.attn.q"):
        SALT(**options).adapter(site(12, 9), None)
