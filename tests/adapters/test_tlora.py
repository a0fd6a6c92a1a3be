"""TLoRA: the traces of the rings written out, the paper's counts, and the start from which slices never part."""

from __future__ import annotations

import itertools

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.tlora import TLoRA
from vision_peft.engine.contract import run_contract
from vision_peft.engine.install import attach
from vision_peft.engine.site import enumerate_sites
from vision_peft.errors import UserError

EXACT = {"rtol": 1e-10, "atol": 1e-11}


def indices(factors):
    return list(itertools.product(*(range(factor) for factor in factors)))


def transform(cores):
    """T entry by entry: the trace of a product of matrices, index 1 slowest."""
    places = indices([len(core) for core in cores])
    T = torch.zeros(len(places), len(places), dtype=torch.float64)
    for (a, i), (b, j) in itertools.product(enumerate(places), repeat=2):
        T[a, b] = torch.linalg.multi_dot([core[i[d], j[d]] for d, core in enumerate(cores)]).trace()
    return T


def ring(B, C):
    outs, ins = indices([len(core) for core in B]), indices([len(core) for core in C])
    D = torch.zeros(len(outs), len(ins), dtype=torch.float64)
    for (a, o), (b, i) in itertools.product(enumerate(outs), enumerate(ins)):
        D[a, b] = torch.linalg.multi_dot([*(core[x] for core, x in zip(B, o)), *(core[x] for core, x in zip(C, i))]).trace()
    return D


def expected(adapter, W, scale):
    with torch.no_grad():
        T = transform(adapter.transform) if len(adapter.transform) else torch.eye(W.shape[1]).double()
        if adapter.noise:
            T = T - transform(adapter.starts()) + torch.eye(W.shape[1])
        return W @ T + scale * (ring(adapter.B, adapter.C) if adapter.ring else adapter.B @ adapter.A)


@pytest.mark.parametrize("residual", ["lora", "ring"])
@pytest.mark.parametrize("transform_rank, symmetry_break", [(0, 0.0), (1, 0.0), (2, 0.0), (1, 0.1), (2, 0.1), (3, 0.1)])
def test_starts_at_the_identity_bit_for_bit(residual, transform_rank, symmetry_break):
    """Four quarters make a whole in floating point, nine ninths do not; with noise equal rings cancel, whatever their values."""
    W = torch.randn(12, 18)
    method = TLoRA(transform_rank=transform_rank, residual=residual, symmetry_break=symmetry_break)
    assert torch.equal(started(method, W).weight(W), W)


@pytest.mark.parametrize("transform_rank", [3, 4])
def test_starts_at_the_identity_to_rounding(transform_rank):
    W = torch.randn(12, 18)
    torch.testing.assert_close(started(TLoRA(transform_rank=transform_rank), W).weight(W), W, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("residual", ["lora", "ring"])
@pytest.mark.parametrize("transform_rank", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (9, 10)])
def test_the_formula(residual, transform_rank, shape):
    W = weight64(*shape)
    adapter = moved(TLoRA(transform_rank=transform_rank, rank=2, alpha=3.0, residual=residual), W)
    torch.testing.assert_close(adapter.weight(W), expected(adapter, W, 3 / 2**0.5), **EXACT)


@pytest.mark.parametrize("factors", [[2, 6], [12], [2, 3, 2, 1], [3, 2, 2]])
def test_the_formula_with_factors_of_ones_own(factors):
    W = weight64(8, 12)
    adapter = moved(TLoRA(rank=2, residual="ring", factors=[[5, 5], factors], symmetry_break=0.1), W)
    assert [len(core) for core in adapter.transform if len(core) > 1 or factors == [2, 3, 2, 1]] == factors
    torch.testing.assert_close(adapter.weight(W), expected(adapter, W, 1 / 2**0.5), **EXACT)


def test_one_bond_is_a_kronecker_product():
    W = weight64(8, 12)
    adapter = moved(TLoRA(transform_rank=1), W)
    with torch.no_grad():
        adapter.B.zero_()
        T = torch.kron(torch.kron(*(core[..., 0, 0] for core in adapter.transform[:2])), adapter.transform[2][..., 0, 0])
    torch.testing.assert_close(adapter.weight(W), W @ T, **EXACT)


def test_a_diagonal_transform_scales_columns():
    W = weight64(8, 12)
    adapter = started(TLoRA(transform_rank=1, factors=[[12]]), W)
    scales = torch.randn(12, dtype=torch.float64)
    with torch.no_grad():
        adapter.transform[1].copy_(torch.diag(scales)[..., None, None])
    torch.testing.assert_close(adapter.weight(W), W * scales, **EXACT)


def test_without_transform_it_is_rank_stabilised_lora():
    W = weight64()
    adapter, lora = moved(TLoRA(transform_rank=0, rank=3), W), started(LoRA(rank=3, alpha=1.0, scaling="sqrt_rank"), W)
    with torch.no_grad():
        lora.A.copy_(adapter.A), lora.B.copy_(adapter.B)
    torch.testing.assert_close(adapter.weight(W), lora.weight(W), **EXACT)
    form = adapter.factored(W)
    torch.testing.assert_close(W + form.B @ form.A, adapter.weight(W), **EXACT)
    assert started(TLoRA(transform_rank=1), W).factored(W) is None


def test_product_of_transforms():
    """T T^T is the ring of the cores sum_l A[i, l] (x) A[j, l]."""
    cores = [torch.randn(factor, factor, 2, 2, dtype=torch.float64) for factor in (2, 2, 3)]
    T = transform(cores)
    grams = [torch.zeros(len(core), len(core), 4, 4, dtype=torch.float64) for core in cores]
    for gram, core in zip(grams, cores):
        for i, j, k in itertools.product(range(len(core)), repeat=3):
            gram[i, j] += torch.kron(core[i, k], core[j, k])
    torch.testing.assert_close(transform(grams), T @ T.mT, **EXACT)


def test_starts_of_the_residuals():
    W = torch.randn(512, 768)
    lora, own = started(TLoRA(rank=8), W), started(TLoRA(rank=8, residual="ring", ring_std=0.5), W)
    assert not lora.B.any()
    assert float(lora.A.detach().std()) == pytest.approx((3 * 768) ** -0.5, rel=0.05)
    assert not own.B[0].any()
    for core, factor in zip(own.B[1:], (8, 8)):
        assert float(core.detach().std()) == pytest.approx(0.5 * factor**0.5 / 64, rel=0.15)
    for core, factor in zip(own.C, (8, 8, 12)):
        assert float(core.detach().std()) == pytest.approx(0.5 * factor**-0.5, rel=0.15)


def test_only_the_first_output_core_of_a_ring_learns_at_first():
    W = weight64(8, 12)
    found = gradients(started(TLoRA(rank=2, residual="ring"), W), W, weight64(8, 12))
    assert found["B.0"].any()
    assert not any(found[name].any() for name in ("B.1", "B.2", "C.0", "C.1", "C.2"))
    assert all(found[f"transform.{d}"].any() for d in range(3))


def parted(symmetry_break):
    """How far the slices of the cores lie apart after 20 steps, beside how far they moved."""
    network = nn.Sequential(nn.Linear(12, 8)).double()
    method = TLoRA(transform_rank=2, rank=2, symmetry_break=symmetry_break)
    adapter = started(method, network[0].weight.detach())
    optimizer = torch.optim.AdamW(method.param_groups({"0": adapter}, None, 0.01), lr=0.01)
    x, target, starts = torch.randn(64, 12).double(), torch.randn(64, 8).double(), [core.clone() for core in adapter.starts()]
    for _ in range(20):
        optimizer.zero_grad()
        (x @ adapter.weight(network[0].weight.detach()).mT - target).square().mean().backward()
        optimizer.step()
    moves = [(core - start).detach() for core, start in zip(adapter.transform, starts)]
    return max(float((move - move[..., :1, :1]).abs().max()) for move in moves), min(float(move.abs().max()) for move in moves)


def test_slices_stay_equal_from_the_published_start_and_part_with_noise():
    apart, moved_by = parted(0.0)
    assert apart < 1e-9 and moved_by > 0.05
    apart, moved_by = parted(0.05)
    assert apart > 0.01 and moved_by > 0.05


def test_noise_is_of_its_size_and_pinned_by_the_mark():
    W = torch.randn(64, 512)
    adapter = started(TLoRA(symmetry_break=0.03), W)
    for start in adapter.starts():
        assert float((start - torch.eye(8)[..., None, None] / 2).std()) == pytest.approx(0.03, rel=0.2)
    assert all(torch.equal(core, start) for core, start in zip(adapter.transform, adapter.starts()))
    assert not [key for key in adapter.state_dict() if "start" in key], "drawn anew, not saved"
    assert torch.equal(adapter.fingerprint(), started(TLoRA(symmetry_break=0.03), W).fingerprint())
    other = started(TLoRA(symmetry_break=0.03), W, seed=1).fingerprint()
    assert not torch.allclose(other, adapter.fingerprint(), rtol=1e-3, atol=1e-4)
    assert started(TLoRA(), W).fingerprint() is None


@pytest.mark.parametrize("key", ["identity_penalty", "orthogonal_penalty"])
def test_penalties_are_zero_at_the_start_with_a_finite_gradient(key):
    W = weight64(8, 12)
    adapter = started(TLoRA(**{key: 0.5}), W)
    adapter.penalty().backward()
    assert float(adapter.penalty().detach()) < 1e-12
    assert all(core.grad.isfinite().all() for core in adapter.transform)
    assert started(TLoRA(), W).penalty() == 0.0


def test_penalties_by_hand():
    W = weight64(8, 12)
    adapter = moved(TLoRA(identity_penalty=0.3, orthogonal_penalty=0.7), W)
    identity = orthogonal = 0.0
    for core in adapter.transform:
        core = core.detach()
        size = len(core)
        for r, s in itertools.product(range(2), repeat=2):
            identity += float((core[:, :, r, s] - torch.eye(size) / 2).norm())
        for i, j in itertools.product(range(size), repeat=2):
            gram = sum(torch.kron(core[i, k], core[j, k]) for k in range(size))
            orthogonal += float((gram - (i == j) * torch.ones(4, 4) / 4).norm())
    assert float(adapter.penalty().detach()) == pytest.approx(0.3 * identity + 0.7 * orthogonal, rel=1e-10)


def test_orthogonal_cores_of_one_bond_have_no_orthogonal_penalty():
    W = weight64(8, 12)
    adapter = started(TLoRA(transform_rank=1, orthogonal_penalty=1.0), W)
    with torch.no_grad():
        for core in adapter.transform:
            core.copy_(torch.linalg.qr(torch.randn(len(core), len(core)).double())[0][..., None, None])
        assert float(adapter.penalty()) < 1e-12
        torch.testing.assert_close(adapter.weight(W) @ adapter.weight(W).mT, W @ W.mT, **EXACT)
    assert delta(adapter, W).abs().max() > 0.1


def test_the_transform_is_not_decayed():
    adapters = attach(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12)), TLoRA(rank=2), "all")
    residual, cores = adapters.param_groups(0.1)
    assert (len(residual["params"]), len(cores["params"]), cores["weight_decay"]) == (4, 6, 0.0)
    assert len(attach(nn.Sequential(nn.Linear(12, 8)), TLoRA(transform_rank=0, rank=2), "all").param_groups(0.1)) == 1


OTHERS = [{"residual": "ring"}, {"symmetry_break": 0.05}, {"transform_rank": 0}, {"transform_rank": 1, "identity_penalty": 0.1}]


@pytest.mark.parametrize("options", OTHERS)
def test_contract_of_the_other_forms(options):
    network = nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(6, 5))
    x = torch.randn(7, 12)
    checks = run_contract(network, enumerate_sites(network), TLoRA(**{"rank": 2} | options), lambda network: network(x), ["0", "3"])
    assert not [check for check in checks if not check.passed]


@pytest.mark.parametrize(
    "size, factors",
    [(320, (4, 8, 10)), (640, (8, 8, 10)), (768, (8, 8, 12)), (1280, (8, 10, 16)), (2048, (8, 16, 16)), (1024, (8, 8, 16))]
    + [(3072, (12, 16, 16)), (512, (8, 8, 8)), (384, (6, 8, 8)), (1000, (10, 10, 10)), (588, (7, 7, 12)), (7, (1, 1, 7)), (1, (1, 1, 1))],
)
def test_factors(size, factors):
    """The published ones among them."""
    assert TLoRA().factors_of(site(4, size), 1) == factors


def test_a_side_that_does_not_split_is_refused_until_it_is_listed():
    with pytest.raises(UserError, match=r"adapter.method.factors: 197, a side of vision.0.attn.q, splits no better than into 1 x 1 x 197"):
        TLoRA().adapter(site(8, 197), None)
    assert TLoRA(factors=[[1, 197]]).count(site(8, 197)) == 4 * (1 + 197**2) + 4 * 205
    assert TLoRA().adapter(site(197, 8), None).B.shape == (197, 4), "the rows of a plain residual need no factors"
    with pytest.raises(UserError, match="factors: 197"):
        TLoRA(residual="ring").adapter(site(197, 8), None)


def test_counts():
    """768 x 768: 272 and 1,088 of a transform, 224 and 2,016 of a ring."""
    wide = site(768, 768)
    assert [TLoRA(transform_rank=t, rank=2, residual="ring").count(wide) - 224 for t in (0, 1, 2)] == [0, 272, 1_088]
    assert TLoRA(transform_rank=0, rank=6, residual="ring").count(wide) == 2_016
    for shape in ((12, 9), (4, 2, 3, 3)):
        for residual in ("lora", "ring"):
            method = TLoRA(rank=2, residual=residual)
            assert trainables(method, site(*shape)) == method.count(site(*shape))


@pytest.mark.parametrize(
    "method, published",
    [
        (TLoRA(transform_rank=0, rank=4), 797_184),
        (TLoRA(transform_rank=2, rank=4), 941_440),
        (TLoRA(transform_rank=2, rank=6, residual="ring"), 400_288),
    ],
)
def test_counts_on_stable_diffusion(method, published):
    """SD 1.5: .80, .94 and .40 million in the paper's table; self and cross attention, text of width 768."""
    blocks = [320] * 5 + [640] * 5 + [1280] * 6
    assert sum(6 * method.count(site(d, d)) + 2 * method.count(site(d, 768)) for d in blocks) == published


@pytest.mark.parametrize(
    "options, message",
    [
        ({"residual": "ttm"}, "residual: 'ttm' is not one of lora, ring"),
        ({"transform_rank": -1}, "transform_rank: -1"),
        ({"symmetry_break": -0.1}, "symmetry_break: -0.1"),
        ({"identity_penalty": -1.0}, "identity_penalty: -1.0"),
        ({"orthogonal_penalty": -1.0}, "orthogonal_penalty: -1.0"),
        ({"transform_rank": 0, "identity_penalty": 1.0}, "identity_penalty: there is no transform"),
        ({"symmetry_break": 0.1, "orthogonal_penalty": 1.0}, "orthogonal_penalty: .* without symmetry_break"),
        ({"ring_std": 0.0}, "ring_std: 0.0"),
        ({"factors": [[]]}, r"factors: \[\]"),
        ({"factors": [[4, 0]]}, r"factors: \[4, 0\]"),
        ({"rank": 0}, "rank: 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        TLoRA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        TLoRA(rank=10).adapter(site(12, 9), None)
