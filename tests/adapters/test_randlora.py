"""RandLoRA: full rank from random bases, of which only diagonals are trained."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, site, weight64
from torch import nn

from vision_peft.adapters.randlora import RandLoRA
from vision_peft.engine.install import attach
from vision_peft.engine.store import load_adapter, save_adapter
from vision_peft.errors import UserError


def attached(method, *shapes, seed=0, stirred=True):
    """An adapter set in float64 on matrices of these shapes; `stirred`: trained numbers off their start."""
    network = nn.ModuleList([nn.Linear(columns, out, bias=False) for out, columns in shapes])
    adapters = attach(network, method, "all", seed=seed).double()
    if stirred:
        with torch.no_grad():
            for parameter in adapters.parameters():
                parameter.add_(torch.randn_like(parameter))
    return adapters


def stacked(adapters, N, r, p):
    """B_i (N, p, r) of the flat stack."""
    return adapters.shared.B[:p, : N * r].reshape(p, N, r).transpose(0, 1)


def test_starts_at_the_identity_bit_for_bit():
    adapter, W = attached(RandLoRA(rank=4), (12, 9), stirred=False).adapters["0"], weight64()
    assert torch.equal(adapter.weight(W), W)
    assert not adapter.lambdas.any()
    assert torch.equal(adapter.gammas, torch.full((3, 9), 1 / 9).double())


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (10, 10)])
@pytest.mark.parametrize("rank", [1, 4, 9, 20])
def test_the_formula(shape, rank):
    """A loop over the bases; in a set whose bases are larger than this layer needs."""
    adapters, W = attached(RandLoRA(rank, alpha=3.0), shape, (13, 14)), weight64(*shape)
    adapter, A, q, p = adapters.adapters["0"], adapters.shared.A, min(shape), max(shape)
    N = -(-q // rank)
    S = torch.zeros(p, q).double()
    for B_i, lam, gam in zip(stacked(adapters, N, rank, p), adapter.lambdas, adapter.gammas):
        S += B_i @ torch.diag(lam) @ A[:, :q] @ torch.diag(gam)
    D = 3.0 / (rank * N**0.5) * (S.mT if shape[1] > shape[0] else S)
    torch.testing.assert_close(delta(adapter, W), D, rtol=0, atol=1e-11)


def test_the_change_has_full_rank():
    """q = 16, r = 5: four bases, rank 16."""
    adapters = attached(RandLoRA(rank=5), (16, 24))
    assert adapters.adapters["0"].lambdas.shape == (4, 5)
    assert torch.linalg.matrix_rank(delta(adapters.adapters["0"], weight64(16, 24))) == 16
    with torch.no_grad():
        adapters.adapters["0"].lambdas[1:] = 0  # one basis alone
    assert torch.linalg.matrix_rank(delta(adapters.adapters["0"], weight64(16, 24))) == 5


def test_gradients_by_hand():
    """dL/dlambda_i[k] = s <G, B_i[:, k] (A[k] * gamma_i)>, dL/dgamma_i[j] = s sum_k lambda_i[k] A[k, j] B_i[:, k]^T G[:, j]."""
    adapters, W, G = attached(RandLoRA(rank=4), (12, 9)), weight64(), weight64()
    adapter, A = adapters.adapters["0"], adapters.shared.A
    found, B, s = gradients(adapter, W, G), stacked(adapters, 3, 4, 12), adapter.scale
    lam, gam = adapter.lambdas.detach(), adapter.gammas.detach()
    torch.testing.assert_close(found["lambdas"], s * torch.einsum("mj,imk,kj,ij->ik", G, B, A, gam), rtol=0, atol=1e-10)
    torch.testing.assert_close(found["gammas"], s * torch.einsum("mj,imk,kj,ik->ij", G, B, A, lam), rtol=0, atol=1e-10)


def test_at_the_start_only_lambda_has_a_gradient():
    found = gradients(attached(RandLoRA(rank=4), (12, 9), stirred=False).adapters["0"], weight64(), weight64())
    assert found["lambdas"].all() and not found["gammas"].any()


def test_one_basis_with_gamma_1_is_one_scaled_product():
    adapters = attached(RandLoRA(rank=9, scaling="rank", alpha=9), (12, 9))
    adapter = adapters.adapters["0"]
    with torch.no_grad():
        adapter.gammas.fill_(1.0)
    expected = adapters.shared.B * adapter.lambdas @ adapters.shared.A
    torch.testing.assert_close(delta(adapter, weight64()), expected.detach(), rtol=0, atol=1e-11)


def test_transposed_shapes_have_transposed_changes():
    adapters = attached(RandLoRA(rank=5), (40, 16), (16, 40))
    tall, wide = adapters.adapters.values()
    wide.load_state_dict(tall.state_dict())
    torch.testing.assert_close(delta(wide, weight64(16, 40)), delta(tall, weight64(40, 16)).mT, rtol=0, atol=1e-11)


def test_bases_are_shared_and_as_large_as_needed():
    """Short sides 9, 9, 4 and long sides 12, 12, 30: A (4, 9), three bases of 30 rows."""
    adapters = attached(RandLoRA(rank=4), (12, 9), (12, 9), (4, 30))
    assert adapters.shared.A.shape == (4, 9) and adapters.shared.B.shape == (30, 12)
    assert all(adapter.shared is adapters.shared for adapter in adapters.adapters.values())
    one, two, _ = adapters.adapters.values()
    assert not torch.equal(one.lambdas, two.lambdas)
    two.load_state_dict(one.state_dict())
    W = weight64()
    assert torch.equal(one.weight(W), two.weight(W))


@pytest.mark.parametrize("basis, zeros", [("uniform", 0), ("normal", 0), ("sparse", 2 / 3), ("very_sparse", 1 - 1 / 12)])
def test_entries_of_the_bases(basis, zeros):
    """Mean square 1; two thirds zeros, or one entry in sqrt(144) not zero."""
    shared = attached(RandLoRA(rank=12, basis=basis), (200, 144)).shared
    for tensor in (shared.A, shared.B):
        assert abs(float(tensor.std()) - 1) < 1e-3
        assert abs(float((tensor == 0).double().mean()) - zeros) < 0.03
    values = len(shared.B.unique())
    assert values == 3 if zeros else values > 20_000
    assert basis != "uniform" or shared.B.abs().max() < 1.02 * 3**0.5


@pytest.mark.parametrize(
    "options, scale",
    [({}, 2 / 24**0.5), ({"alpha": 16.0}, 0.5 / 24**0.5), ({"scaling": "rank"}, 2), ({"scaling": "rank", "alpha": 640}, 20)],
)
def test_scales(options, scale):
    """768 x 768 at r = 32: N = 24; PEFT's default is alpha = 640 over r."""
    assert RandLoRA(**options).adapter(site(768, 768), None).scale == pytest.approx(scale)


def test_counts():
    """768 x 768 and 3072 x 768 at r = 6: 99,072; at r = 32: 19,200. CLIP ViT-B, both towers, three matrices a block, r = 6: 5,170,320."""
    for shape in ((768, 768), (3072, 768), (768, 3072), (2304, 768)):
        assert RandLoRA(rank=6).count(site(*shape)) == 99_072
    assert RandLoRA().count(site(768, 768)) == 19_200
    towers = [site(3 * d, d) for d in (768, 512)] + [site(4 * d, d) for d in (768, 512)] + [site(d, 4 * d) for d in (768, 512)]
    assert sum(12 * RandLoRA(rank=6).count(each) for each in towers) == 5_170_320
    assert 1.9 < RandLoRA(rank=16).count(site(768, 768)) / RandLoRA(rank=32).count(site(768, 768)) < 2.1
    adapter = attached(RandLoRA(rank=4), (12, 9)).adapters["0"]
    assert sum(p.numel() for p in adapter.parameters()) == RandLoRA(rank=4).count(site(12, 9)) == 3 * 13


def test_a_file_holds_no_bases(tmp_path):
    """Width 384: 1.1 MiB of bases, which the file leaves out and which come back on load."""
    own = nn.Sequential(nn.Linear(384, 384), nn.Linear(384, 768)).requires_grad_(False)
    adapters = attach(own, RandLoRA(), "all", seed=5)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter))
    folder = save_adapter(tmp_path / "adapter", own, seed=5)
    assert (folder / "adapter_model.safetensors").stat().st_size < 4 * 2 * RandLoRA().count(site(384, 384)) + 2000
    fresh = nn.Sequential(nn.Linear(384, 384), nn.Linear(384, 768))
    fresh.load_state_dict(own.state_dict())
    load_adapter(fresh, folder)
    x = torch.randn(3, 384)
    assert torch.equal(fresh(x), own(x))


def test_another_set_of_layers_has_other_bases_and_is_told_apart():
    """The sizes of the bases are those of the set, so trained values fit no other set."""
    small, large = attached(RandLoRA(rank=4), (12, 9)), attached(RandLoRA(rank=4), (12, 9), (30, 12))
    assert not torch.allclose(small.shared.fingerprint(), large.shared.fingerprint(), rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="shared bases"):
        large.load_state_dict({**large.state_dict(), "shared.fingerprint": small.state_dict()["shared.fingerprint"]})


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_with_dropout_the_branch_is_factored(shape):
    W = weight64(*shape)
    adapter = attached(RandLoRA(rank=4, dropout=0.1), shape).adapters["0"]
    form = adapter.factored(W)
    assert form.dropout == 0.1
    torch.testing.assert_close(W + form.B @ form.A, adapter.weight(W), rtol=0, atol=1e-11)
    assert attached(RandLoRA(rank=4), shape).adapters["0"].factored(W) is None


@pytest.mark.parametrize("out, columns", [(10, 7), (7, 10)])
def test_against_the_layer_of_peft(out, columns):
    """After its pairing of columns and rows: column i r + k of its B meets row k N + i of its A."""
    peft = pytest.importorskip("peft")
    network = nn.Sequential(nn.Linear(columns, out))
    adapters = attach(network, RandLoRA(rank=3, alpha=5.0, scaling="rank"), "all")
    adapter, N = adapters.adapters["0"], 3
    with torch.no_grad():
        adapter.lambdas.normal_(), adapter.gammas.normal_()
    twin = nn.Sequential(nn.Linear(columns, out))
    twin.load_state_dict(network.state_dict())
    twin = peft.get_peft_model(twin, peft.RandLoraConfig(r=3, randlora_alpha=5, target_modules=["0"]))
    layer = twin.base_model.model[0]
    assert torch.equal(layer.randlora_gamma["default"], torch.full((N, 7), 1 / 7))
    layer.randlora_A["default"].data.copy_(adapters.shared.A[:, None])
    layer.randlora_B["default"].data.copy_(stacked(adapters, N, 3, 10).permute(1, 2, 0).reshape(10, N, 3))
    layer.randlora_lambda["default"].data.copy_(adapter.lambdas.mT)
    layer.randlora_gamma["default"].data.copy_(adapter.gammas)
    x = torch.randn(4, columns)
    ours, theirs = network(x), twin(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    ours.square().sum().backward(), theirs.square().sum().backward()
    torch.testing.assert_close(adapter.lambdas.grad.mT, layer.randlora_lambda["default"].grad, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(adapter.gammas.grad, layer.randlora_gamma["default"].grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank: 0 is not positive"),
        ({"scaling": "sqrt_rank"}, "scaling: 'sqrt_rank' is not one of sqrt_bases, rank"),
        ({"basis": "binary"}, "basis: 'binary' is not one of uniform, normal, sparse, very_sparse"),
        ({"dropout": -0.1}, "dropout: -0.1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=f"adapter.method.{message}"):
        RandLoRA(**options)
