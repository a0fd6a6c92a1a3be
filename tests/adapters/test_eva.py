"""EVA: directions of the inputs, and ranks dealt out by what they explain."""

from __future__ import annotations

import pytest
import torch
from fakes import gradients, site, trainables, weight64
from torch import nn

from vision_peft.adapters.eva import EVA
from vision_peft.engine.adapter import Evidence
from vision_peft.engine.evidence import collect
from vision_peft.engine.install import attach
from vision_peft.engine.peft_layout import save_peft
from vision_peft.engine.site import enumerate_sites
from vision_peft.errors import UserError

EXACT = {"rtol": 0, "atol": 1e-11}


def started(method, W, C):
    adapter = method.adapter(site(*W.shape), None).to(W.dtype)
    with torch.no_grad():
        adapter.initialize(W, Evidence(torch.Generator().manual_seed(0), covariance=C))
    return adapter


def inputs(columns=9, rows=200):
    return torch.randn(rows, columns, dtype=torch.float64) @ weight64(columns, columns)


def dealt(method, *spectra):
    """Ranks of layers whose inputs have these spectra."""
    adapters = {str(i): started(method, torch.randn(20, len(each)), torch.diag(torch.tensor(each))) for i, each in enumerate(spectra)}
    method.allocate(adapters, None)
    return [int(each.mask.sum()) for each in adapters.values()]


def test_starts_at_the_identity_bit_for_bit():
    W = torch.randn(12, 9)
    assert torch.equal(started(EVA(rank=3), W, inputs().float().T.cov()).weight(W), W)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_a_is_the_leading_right_singular_vectors_of_the_inputs(shape):
    x = inputs(shape[1])
    adapter = started(EVA(rank=3), weight64(*shape), x.mT @ x / len(x))
    _, S, Vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(adapter.A.abs(), Vh[:6].abs(), **EXACT)
    torch.testing.assert_close(adapter.explained, S[:6].square() / S.square().sum(), **EXACT)


def test_against_the_incremental_pca_of_peft():
    """On inputs of mean zero, which it subtracts."""
    pca = pytest.importorskip("peft.utils.incremental_pca")
    x = inputs()
    x = x - x.mean(0)
    theirs = pca.IncrementalPCA(n_components=6)
    theirs.partial_fit(x)
    ours = started(EVA(rank=3), weight64(), x.mT @ x / len(x))
    torch.testing.assert_close(ours.A.detach().abs(), theirs.components_.double().abs(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.explained, theirs.explained_variance_ratio_[:6].double(), rtol=1e-4, atol=1e-5)


def test_ranks_go_where_the_largest_shares_are():
    """Four ranks for two layers: the largest four of the eight shares."""
    assert dealt(EVA(rank=2), [0.6, 0.31, 0.06, 0.03], [0.3, 0.26, 0.24, 0.2]) == [2, 2]
    assert dealt(EVA(rank=2), [0.97, 0.01, 0.01, 0.01], [0.3, 0.26, 0.24, 0.2]) == [1, 3]
    assert dealt(EVA(rank=2), [0.5, 0.5, 0.0, 0.0], [0.3, 0.26, 0.24, 0.2]) == [2, 2]


def test_shares_count_not_sizes():
    assert dealt(EVA(rank=2), [970.0, 10.0, 10.0, 10.0], [0.03, 0.026, 0.024, 0.02]) == [1, 3]


@pytest.mark.parametrize("rho, ranks", [(1.0, [2, 2, 2]), (1.5, [1, 2, 3]), (2.0, [1, 1, 4]), (3.0, [1, 1, 4])])
def test_rho_bounds_the_ranks_of_a_layer(rho, ranks):
    spectra = ([0.97, 0.01, 0.01, 0.01], [0.8, 0.08, 0.07, 0.05], [0.28, 0.26, 0.24, 0.22])
    assert dealt(EVA(rank=2, rho=rho), *spectra) == ranks


def test_the_budget_is_spent_and_every_layer_keeps_a_rank():
    torch.manual_seed(0)
    spectra = [torch.rand(8).pow(4).tolist() for _ in range(12)]
    ranks = dealt(EVA(rank=3, rho=2.5), *spectra)
    assert sum(ranks) == 36
    assert min(ranks) >= 1
    assert max(ranks) <= 8
    assert len(set(ranks)) > 1
    assert dealt(EVA(rank=1, rho=4.0), [0.4, 0.3, 0.2, 0.1], [1.0, 0.0, 0.0, 0.0]) == [1, 1]


def test_masked_ranks_neither_act_nor_learn():
    W, G = weight64(), weight64()
    adapter = started(EVA(rank=3, alpha=6.0), W, torch.eye(9).double())
    with torch.no_grad():
        adapter.keep(2)
        adapter.A.normal_(), adapter.B.normal_()
    torch.testing.assert_close(adapter.weight(W), W + 2 * adapter.B[:, :2] @ adapter.A[:2], **EXACT)
    found = gradients(adapter, W, G)
    assert not found["A"][2:].any()
    assert not found["B"][:, 2:].any()
    torch.testing.assert_close(found["B"][:, :2], 2 * G @ adapter.A[:2].mT, **EXACT)


def test_the_scale_stays_that_of_the_rank_asked_for():
    assert started(EVA(rank=3, alpha=6.0, rho=2.0), weight64(), None).scale == 2.0


def network_with_evidence(method):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 8))
    x = torch.randn(64, 9)
    evidence = collect(network, enumerate_sites(network)[::2], method.evidence, [None], lambda _: network(x).square().mean())
    return network, x, attach(network, method, "all", evidence=evidence)


def test_ranks_are_dealt_out_on_a_network_and_stored():
    network, _, adapters = network_with_evidence(EVA(rank=2))
    ranks = [int(each.mask.sum()) for each in adapters.named_adapters().values()]
    assert sum(ranks) == 4
    fresh = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 8))
    fresh.load_state_dict(network.state_dict())
    other = attach(fresh, EVA(rank=2), "all", restoring=True)
    other.load_state_dict(adapters.state_dict())
    assert [int(each.mask.sum()) for each in other.named_adapters().values()] == ranks


def test_an_export_holds_the_ranks_that_act(tmp_path):
    peft = pytest.importorskip("peft")
    network, x, adapters = network_with_evidence(EVA(rank=2))
    with torch.no_grad():
        for each, k in zip(adapters.named_adapters().values(), (1, 3)):
            each.keep(k)
            each.A.normal_(), each.B.normal_()
    for each, k in zip(adapters.named_adapters().values(), (1, 3)):
        assert each.compact().A.shape[0] == k
        assert each.A.shape[0] == 4
    save_peft(tmp_path / "peft", network, base_model=None)
    bare = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 8))
    bare.load_state_dict(network.state_dict())
    loaded = peft.PeftModel.from_pretrained(bare, tmp_path / "peft")
    torch.testing.assert_close(loaded(x), network(x), rtol=1e-3, atol=1e-4)
    assert loaded.base_model.model[0].lora_A["default"].weight.shape[0] == 1


def test_only_layers_that_multiply_an_input_are_adapted():
    assert [EVA().suits(site(12, 9, kind=kind)) for kind in ("linear", "conv", "embedding", "bare")] == [True, True, False, False]


def test_counts():
    """What is held is rho times LoRA's; 24,576 for 768 x 768 at r = 8."""
    assert EVA().count(site(768, 768)) == 24_576
    assert EVA(rho=1.0).count(site(768, 768)) == 12_288
    for shape in ((12, 9), (4, 2, 3, 3), (20, 12)):
        assert trainables(EVA(rank=3), site(*shape)) == EVA(rank=3).count(site(*shape)) == min(6, shape[0]) * sum(site(*shape).matrix_shape)


@pytest.mark.parametrize(
    "options, message",
    [({"rho": 0.5}, "rho: 0.5 is less than 1"), ({"rank": 0}, "rank: 0"), ({"scaling": "x"}, "scaling"), ({"dropout": 1.0}, "dropout")],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        EVA(**options)


def test_a_rank_that_does_not_fit():
    with pytest.raises(UserError, match="rank: 10 does not fit"):
        EVA(rank=10).adapter(site(12, 9), None)
