"""Decompositions kept on disk: the same as computed, found again, computed anew where the file is damaged or the weight another."""

from __future__ import annotations

import pytest
import torch

from vision_peft.linalg import svd_cache
from vision_peft.linalg.svd import thin_svd
from vision_peft.linalg.svd_cache import SMALLEST, cached_svd


@pytest.fixture
def computed(monkeypatch, tmp_path):
    """Shapes of the weights that were really decomposed."""
    monkeypatch.setenv("VISION_PEFT_CACHE", str(tmp_path))
    shapes = []

    def counting(W):
        shapes.append(tuple(W.shape))
        return thin_svd(W)

    monkeypatch.setattr(svd_cache, "thin_svd", counting)
    return shapes


def test_found_again_bit_for_bit(computed):
    W = torch.randn(160, 200)
    first, second = cached_svd(W), cached_svd(W.clone())
    assert computed == [(160, 200)]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a, b) for a, b in zip(first, thin_svd(W)))


def test_another_weight_is_another_file(computed):
    W = torch.randn(160, 200)
    cached_svd(W)
    W[0, 0] += 1e-6
    cached_svd(W)
    cached_svd(W.view(200, 160))
    assert computed == [(160, 200), (160, 200), (200, 160)]


def test_small_weights_are_not_kept(computed, tmp_path):
    cached_svd(torch.randn(10, 20))
    assert SMALLEST > 200 and computed == [(10, 20)] and not list(tmp_path.rglob("*.safetensors"))


def test_a_damaged_file_is_computed_anew(computed, tmp_path):
    W = torch.randn(160, 200)
    cached_svd(W)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(cached_svd(W).S, thin_svd(W).S)
    assert computed == [(160, 200)] * 2
    cached_svd(W)
    assert len(computed) == 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [file.name]
