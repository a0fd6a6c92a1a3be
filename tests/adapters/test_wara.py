"""WaRA: the wavelet domain written out with dense matrices, the paper's procedure on the inputs, and the layout of the bands."""

from __future__ import annotations

import pytest
import torch
from fakes import delta, gradients, moved, site, started, trainables, weight64
from torch import nn

from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.wara import BANDS, WaRA
from vision_peft.engine.contract import run_contract
from vision_peft.engine.site import enumerate_sites
from vision_peft.errors import UserError
from vision_peft.linalg.svd import thin_svd
from vision_peft.linalg.wavelet import WAVELETS, dwt_matrix

EXACT = {"rtol": 0, "atol": 1e-11}
SHAPES = [(12, 10), (10, 12), (11, 9), (12, 9)]
MODES = ["shared", "per_band", "core"]


def wavelets(size, wavelet):
    """H without the column of the appended zero."""
    return dwt_matrix(size + size % 2, wavelet)[:, :size]


def spectrum(D, wavelet):
    """2-D transform of an update of even sides, as bands in [[LL, HL], [LH, HH]]."""
    K = wavelets(D.shape[0], wavelet) @ D @ wavelets(D.shape[1], wavelet).mT
    m, n = D.shape[0] // 2, D.shape[1] // 2
    return {"LL": K[:m, :n], "HL": K[:m, n:], "LH": K[m:, :n], "HH": K[m:, n:]}


@pytest.mark.parametrize("mode", MODES)
def test_starts_at_the_identity_bit_for_bit(mode):
    W = torch.randn(12, 9)
    assert torch.equal(started(WaRA(rank=2, mode=mode), W).weight(W), W)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
def test_shared(shape, wavelet):
    W = weight64(*shape)
    adapter = moved(WaRA(rank=3, alpha=6.0, wavelet=wavelet), W)
    K = torch.block_diag(adapter.B @ adapter.A, adapter.B @ adapter.A)
    expected = 2 * wavelets(shape[0], wavelet).mT @ K @ wavelets(shape[1], wavelet)
    torch.testing.assert_close(adapter.weight(W) - W, expected, **EXACT)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_shared_bands_of_the_update(wavelet):
    """LL = HH = B A, nothing across; ||D||_F = sqrt(2) ||B A||_F; rank 2 r."""
    W = weight64(12, 10)
    adapter = moved(WaRA(rank=2, alpha=2.0, wavelet=wavelet), W)
    D, P = delta(adapter, W), (adapter.B @ adapter.A).detach()
    bands = spectrum(D, wavelet)
    for band, expected in (("LL", P), ("HH", P), ("LH", 0 * P), ("HL", 0 * P)):
        torch.testing.assert_close(bands[band], expected, **EXACT)
    assert float(D.norm()) == pytest.approx(2**0.5 * float(P.norm()), rel=1e-11)
    assert torch.linalg.matrix_rank(D) == 4


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db3"])
def test_shared_is_the_procedure_on_the_inputs(wavelet):
    """X (features, tokens): 2-D transform, the pair on the features of every subband, inverse transform."""
    W, X = weight64(12, 10), weight64(10, 8)
    adapter = moved(WaRA(rank=3, alpha=3.0, wavelet=wavelet), W)
    P = (adapter.B @ adapter.A).detach()
    out, columns, tokens = (dwt_matrix(size, wavelet) for size in (12, 10, 8))
    C = columns @ X @ tokens.mT
    adapted = torch.cat([P @ C[:5], P @ C[5:]])  # low and high features; both halves of the tokens at once
    torch.testing.assert_close(delta(adapter, W) @ X, out.mT @ adapted @ tokens, **EXACT)


def test_haar_repeats_the_entries_on_diagonal_blocks():
    W = weight64(12, 10)
    adapter = moved(WaRA(rank=2, alpha=2.0), W)
    expected = torch.kron((adapter.B @ adapter.A).detach(), torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(delta(adapter, W), expected, **EXACT)


@pytest.mark.parametrize("bands", [None, ["LL"], ["HH", "LH"], ["LL", "LH", "HL"]])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_per_band(bands, wavelet):
    """Every band has its own pair, the others stay empty; squared norms add up."""
    W = weight64(12, 10)
    adapter = moved(WaRA(rank=2, alpha=3.0, mode="per_band", bands=bands, wavelet=wavelet), W)
    D = delta(adapter, W)
    found, energy = spectrum(D, wavelet), 0.0
    for band in BANDS:
        expected = torch.zeros(6, 5, dtype=torch.float64)
        if band in (bands or BANDS):
            expected = 1.5 * (adapter.B[band] @ adapter.A[band]).detach()
        torch.testing.assert_close(found[band], expected, **EXACT)
        energy += float(expected.square().sum())
    assert float(D.square().sum()) == pytest.approx(energy, rel=1e-11)


def test_the_first_letter_is_the_input():
    """HL takes the differences of an input and writes averages: it ignores constants, and its outputs come in equal pairs."""
    W = weight64(12, 10)
    D = delta(moved(WaRA(rank=2, mode="per_band", bands=["HL"]), W), W)
    assert (D @ torch.ones(10, dtype=torch.float64)).abs().max() < 1e-12 < D.abs().max()
    torch.testing.assert_close(D[0::2], D[1::2], **EXACT)


def test_four_bands_of_one_factorisation_are_lora_in_a_rotated_basis():
    W = weight64(12, 10)
    adapter = moved(WaRA(rank=3, alpha=3.0, mode="per_band", wavelet="db2"), W)
    A, B = torch.randn(3, 10, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    with torch.no_grad():
        for band in BANDS:
            adapter.A[band].copy_(A[:, :5] if band[0] == "L" else A[:, 5:])
            adapter.B[band].copy_(B[:6] if band[1] == "L" else B[6:])
    expected = (dwt_matrix(12, "db2").mT @ B) @ (A @ dwt_matrix(10, "db2"))
    torch.testing.assert_close(delta(adapter, W), expected, **EXACT)


@pytest.mark.parametrize("shape", SHAPES)
def test_core(shape):
    """Bases are the leading singular vectors of the low-low block of the weight itself."""
    W = weight64(*shape)
    adapter = moved(WaRA(rank=2, alpha=5.0, mode="core", wavelet="db2"), W)
    H_m, H_n = wavelets(shape[0], "db2"), wavelets(shape[1], "db2")
    low = (H_m @ W @ H_n.mT)[: len(H_m) // 2, : len(H_n) // 2]
    U = thin_svd(low).U
    sign = torch.sign((U[:, :2] * adapter.U).sum(0))
    torch.testing.assert_close(adapter.U * sign, U[:, :2], **EXACT)
    P = adapter.U @ adapter.R @ adapter.Vh
    torch.testing.assert_close(delta(adapter, W), (2.5 * H_m.mT @ torch.block_diag(P, P) @ H_n).detach(), **EXACT)
    assert set(adapter.state_dict()) == {"R"}
    assert not torch.allclose(started(WaRA(rank=2, mode="core"), W.flip(0)).fingerprint(), adapter.fingerprint(), rtol=1e-3, atol=1e-4)


def test_gradients_of_shared_factors_sum_both_bands():
    W, G = weight64(12, 10), weight64(12, 10)
    adapter = moved(WaRA(rank=2, alpha=6.0, wavelet="db2"), W)
    bands = spectrum(G, "db2")
    both = 3 * (bands["LL"] + bands["HH"])
    found = gradients(adapter, W, G)
    torch.testing.assert_close(found["B"], both @ adapter.A.mT.detach(), **EXACT)
    torch.testing.assert_close(found["A"], adapter.B.mT.detach() @ both, **EXACT)


OTHERS = [{"mode": "per_band"}, {"mode": "core"}, {"wavelet": "sym4"}, {"mode": "per_band", "bands": ["LL", "HH"]}]


@pytest.mark.parametrize("options", OTHERS)
def test_contract_of_the_other_modes(options):
    network = nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(6, 5))
    x = torch.randn(7, 12)
    method = WaRA(rank=2, alpha=2.0, **options)
    checks = run_contract(network, enumerate_sites(network), method, lambda network: network(x), ["0", "3"])
    assert not [check for check in checks if not check.passed]


def test_counts():
    """768 x 768: shared r = 8 and per_band r = 2 as LoRA r = 4, 6,144; half of LoRA at equal rank."""
    wide = site(768, 768)
    assert WaRA(rank=8).count(wide) == WaRA(rank=2, mode="per_band").count(wide) == LoRA(rank=4).count(wide) == 6_144
    assert WaRA(rank=8, mode="core").count(wide) == 64
    assert WaRA(rank=2, mode="per_band", bands=["LL"]).count(wide) == 1_536
    for shape in ((12, 9), (11, 7), (4, 2, 3, 3)):
        for mode in MODES:
            assert trainables(WaRA(rank=2, mode=mode), site(*shape)) == WaRA(rank=2, mode=mode).count(site(*shape))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "token_grid"}, "mode: 'token_grid' is not one of shared, per_band, core .*WaRATokens"),
        ({"wavelet": "haa"}, "wavelet: unknown wavelet 'haa'; did you mean haar"),
        ({"bands": ["LL"]}, "bands: only mode per_band"),
        ({"mode": "per_band", "bands": []}, r"bands: \[\]"),
        ({"mode": "per_band", "bands": ["LL", "XX"]}, "bands: .*XX"),
        ({"mode": "per_band", "bands": ["LL", "LL"]}, "each once"),
        ({"rank": 0}, "rank: 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        WaRA(**options)


def test_a_rank_that_does_not_fit_the_halves():
    with pytest.raises(UserError, match=r"rank: 6 does not fit vision.0.attn.q, whose 12 x 9 matrix has halves \(6, 5\)"):
        WaRA(rank=6).adapter(site(12, 9), None)
    assert WaRA(rank=5).adapter(site(12, 9), None).A.shape == (5, 5)
