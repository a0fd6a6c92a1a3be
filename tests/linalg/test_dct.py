"""The cosine transform against scipy's, and what sharing its matrix must not break."""

from __future__ import annotations

import pytest
import scipy.fft
import torch

from vision_peft.errors import UserError
from vision_peft.linalg.dct import LARGEST, dct2, dct_matrix, idct2

F64 = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 97, 384])
def test_matrix_is_the_orthonormal_dct_of_scipy(size):
    C = dct_matrix(size, F64)
    x = torch.randn(size, dtype=torch.float64)
    torch.testing.assert_close(C @ x, torch.from_numpy(scipy.fft.dct(x.numpy(), type=2, norm="ortho")), rtol=0, atol=1e-12)
    torch.testing.assert_close(C @ C.mT, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 5)])
def test_2d(shape):
    X = torch.randn(3, *shape, dtype=torch.float64)
    expected = torch.from_numpy(scipy.fft.dctn(X.numpy(), axes=(1, 2), norm="ortho"))
    torch.testing.assert_close(dct2(X), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(idct2(X), torch.from_numpy(scipy.fft.idctn(X.numpy(), axes=(1, 2), norm="ortho")), rtol=0, atol=1e-12)
    torch.testing.assert_close(idct2(dct2(X)), X, rtol=0, atol=1e-12)


def test_float32_is_the_float64_matrix_rounded_once():
    assert torch.equal(dct_matrix(768, torch.zeros(())), dct_matrix(768, F64).float())


def test_one_matrix_a_size_and_type():
    assert dct_matrix(12, F64) is dct_matrix(12, torch.ones(3, dtype=torch.float64))
    assert dct_matrix(12, torch.zeros(())).dtype == torch.float32


def test_first_asked_for_in_inference_mode_and_then_trained_with():
    with torch.inference_mode():
        dct_matrix(61, torch.zeros(()))
    x = torch.randn(61, requires_grad=True)
    (dct_matrix(61, x) @ x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-4, atol=1e-5)


def test_a_side_without_end():
    with pytest.raises(UserError, match="too long for a cosine transform"):
        dct_matrix(LARGEST + 1, F64)
