"""NOLA: thin factors out of a bag of random matrices; only the mixing weights are trained."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, site, weight64
from safetensors.torch import load_file, save_file
from torch import nn

from vision_peft.adapters.nola import NOLA
from vision_peft.engine.install import attach
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError

VISION = {"rank": 1, "bases": 1024, "alpha": 1.0, "variant": "vision"}


def attached(method, *shapes, seed=0, stirred=True):
    """An adapter set in float64 on matrices of these shapes; `stirred`: trained numbers off their start."""
    network = nn.ModuleList([nn.Linear(columns, out, bias=False) for out, columns in shapes])
    adapters = attach(network, method, "all", seed=seed).double()
    if stirred:
        with torch.no_grad():
            for parameter in adapters.parameters():
                parameter.add_(torch.randn_like(parameter))
    return adapters


def bags(adapters, out, columns, k, r):
    """A_i (k, r, n) and B_j (k, m, r)."""
    shared = adapters.shared
    return shared.get_buffer(f"A_{columns}").view(k, r, columns), shared.get_buffer(f"B_{out}").view(k, out, r)


def test_language_starts_at_the_identity_bit_for_bit():
    adapter, W = attached(NOLA(bases=6, rank=2), (12, 9), stirred=False).adapters["0"], weight64()
    assert torch.equal(adapter.weight(W), W)
    assert not adapter.alpha.any() and not adapter.beta.any()
    assert 0 < adapter.A_0.abs().max() <= 1 / 3
    assert NOLA().identity_at_init


@pytest.mark.parametrize("variant", ["language", "vision"])
def test_the_formula(variant):
    """Sums over the bases, written out."""
    adapters, W = attached(NOLA(rank=3, bases=6, alpha=2.0, variant=variant), (12, 9), (9, 12)), weight64()
    adapter, (A_i, B_j) = adapters.adapters["0"], bags(adapters, 12, 9, 6, 3)
    A = sum(weight * each for weight, each in zip(adapter.alpha, A_i))
    B = sum(weight * each for weight, each in zip(adapter.beta, B_j))
    if variant == "language":
        A = A + adapter.A_0
    torch.testing.assert_close(adapter.weight(W), W + 2 / 3 * B @ A, rtol=0, atol=1e-11)
    assert torch.linalg.matrix_rank(delta(adapter, W)) == 3


def test_gradients_by_hand():
    """dL/dalpha_i = s <B^T G, A_i>, dL/dbeta_j = s <G A^T, B_j>."""
    adapters, W, G = attached(NOLA(rank=3, bases=6, alpha=2.0), (12, 9)), weight64(), weight64()
    adapter, (A_i, B_j) = adapters.adapters["0"], bags(adapters, 12, 9, 6, 3)
    found, form = gradients(adapter, W, G), adapter.factored(W)
    torch.testing.assert_close(found["alpha"], torch.einsum("rn,krn->k", form.B.detach().mT @ G, A_i), rtol=0, atol=1e-11)
    torch.testing.assert_close(found["beta"], 2 / 3 * torch.einsum("mr,kmr->k", G @ form.A.detach().mT, B_j), rtol=0, atol=1e-11)


def test_at_the_start_beta_has_a_gradient_and_alpha_has_none():
    found = gradients(attached(NOLA(rank=3, bases=6), (12, 9), stirred=False).adapters["0"], weight64(), weight64())
    assert found["beta"].all() and not found["alpha"].any()


def test_the_change_is_bilinear():
    """Linear in beta; affine in alpha because of the offset."""
    adapter, W = attached(NOLA(rank=3, bases=6), (12, 9)).adapters["0"], weight64()
    one = delta(adapter, W)
    with torch.no_grad():
        adapter.beta.mul_(-3.0)
    torch.testing.assert_close(delta(adapter, W), -3 * one, rtol=0, atol=1e-10)
    plain = attached(NOLA(rank=3, bases=6, variant="vision"), (12, 9)).adapters["0"]
    before = delta(plain, W)
    with torch.no_grad():
        plain.alpha.mul_(2.0), plain.beta.mul_(5.0)
    torch.testing.assert_close(delta(plain, W), 10 * before, rtol=1e-10, atol=1e-12)


def test_enough_bases_give_every_factor():
    """k >= r n: the limit is LoRA."""
    adapters = attached(NOLA(rank=2, bases=12, variant="vision"), (5, 6))
    adapter, A = adapters.adapters["0"], torch.randn(2, 6).double()
    with torch.no_grad():
        adapter.alpha.copy_(torch.linalg.solve(adapters.shared.A_6.mT, A.flatten()))
    torch.testing.assert_close(adapter.factored(weight64(5, 6)).A.detach(), A, rtol=0, atol=1e-9)


def test_entries_of_the_language_bases():
    """U(-1, 1) / sqrt(k), whatever the size."""
    adapters = attached(NOLA(rank=4, bases=100), (40, 60))
    for bag in bags(adapters, 40, 60, 100, 4):
        assert 0.0999 < bag.abs().max() <= 0.1 + 1e-6
        assert abs(float(bag.std()) * 3**0.5 - 0.1) < 1e-3


def test_the_vision_variant_starts_small_but_not_at_zero():
    """Bounds 1 / sqrt(n r) and 1 / sqrt(r m), mixing weights 1 / k; the change is of norm 3e-4 for 1024 -> 4096 at r = 1."""
    adapters = attached(NOLA(**VISION), (4096, 1024), stirred=False)
    adapter = adapters.adapters["0"]
    for name, size in (("A_1024", 1024), ("B_4096", 4096)):
        bag = adapters.shared.get_buffer(name)
        assert bag.shape == (1024, size)
        assert 0.999 * size**-0.5 < bag.abs().max() <= size**-0.5 * (1 + 1e-6)
    assert adapter.A_0 is None
    assert (adapter.alpha == 1 / 1024).all() and (adapter.beta == 1 / 1024).all()
    form = adapter.factored(torch.zeros(4096, 1024).double())
    assert 2e-4 < form.B.norm() * form.A.norm() < 4e-4  # r = 1: the norm of the product
    assert not NOLA(**VISION).identity_at_init


def test_layers_of_one_size_share_their_bases_but_not_their_offset():
    adapters = attached(NOLA(rank=2, bases=6), (12, 9), (12, 9), (9, 12), stirred=False)
    assert {name: tuple(each.shape) for name, each in adapters.shared.named_buffers()} == {
        "A_9": (6, 18), "A_12": (6, 24), "B_9": (6, 18), "B_12": (6, 24),
    }  # fmt: skip
    one, two, _ = adapters.adapters.values()
    assert one.shared is two.shared is adapters.shared
    assert not torch.equal(one.A_0, two.A_0)


def test_the_seed_gives_the_same_bases_again():
    one, again, other = (attached(NOLA(rank=2, bases=6), (12, 9), seed=seed, stirred=False) for seed in (1, 1, 2))
    assert torch.equal(one.shared.A_9, again.shared.A_9) and torch.equal(one.adapters["0"].A_0, again.adapters["0"].A_0)
    assert not torch.equal(one.shared.A_9, other.shared.A_9)
    assert not torch.equal(one.adapters["0"].A_0, other.adapters["0"].A_0)


def test_counts():
    """2 k whatever shape and rank: 98,304 for the MLPs of ViT-L at k = 1024, 49,152 at k = 512."""
    layers = [site(4096, 1024), site(1024, 4096)] * 24
    assert sum(NOLA(**VISION).count(each) for each in layers) == 98_304
    assert sum(NOLA().count(each) for each in layers) == 49_152
    for shape in ((12, 9), (5, 7)):
        adapter = attached(NOLA(rank=3, bases=6), shape).adapters["0"]
        assert sum(p.numel() for p in adapter.parameters()) == NOLA(rank=3, bases=6).count(site(*shape)) == 12


def test_a_file_holds_the_mixing_weights_only():
    state = attached(NOLA(rank=2, bases=6), (12, 9)).state_dict()
    assert set(state) == {"adapters.0.alpha", "adapters.0.beta", "adapters.0.fingerprint", "shared.fingerprint"}
    state = attached(NOLA(rank=2, bases=6, variant="vision"), (12, 9)).state_dict()
    assert set(state) == {"adapters.0.alpha", "adapters.0.beta", "shared.fingerprint"}


@pytest.mark.parametrize("key, message", [("shared.fingerprint", "shared bases: the basis"), ("adapters.0.fingerprint", "0: the basis")])
def test_other_bases_and_other_offsets_are_refused_on_load(tmp_path, key, message):
    network = nn.Sequential(nn.Linear(7, 6))
    attach(network, NOLA(rank=2, bases=6), "all")
    folder = save_adapter(tmp_path / "adapter", network)
    fresh = nn.Sequential(nn.Linear(7, 6))
    fresh.load_state_dict(network.state_dict())
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[key] = tensors[key].flip(0)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(fresh, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: 0 is not positive"),
        ({"bases": 0}, "bases: 0 is not positive"),
        ({"variant": "vit"}, "variant: 'vit' is not one of language, vision"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=f"adapter.method.{message}"):
        NOLA(**options)
