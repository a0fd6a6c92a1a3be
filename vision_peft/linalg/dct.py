"""The orthonormal cosine transform (DCT-II) of vectors and matrices, as products with a matrix that is built once a size."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vision_peft.errors import UserError

LARGEST = 16384  # a side; its matrix takes 1 GB in float32


def dct_matrix(size: int, like: Tensor) -> Tensor:
    """C (size, size), C[i, j] = sqrt(2/N) cos(pi (2 j + 1) i / (2 N)), row 0 divided by sqrt(2): C C^T = I; C x is the DCT-II of x.

    Built in float64, in the type and on the device of `like`; one matrix a size, type and device, shared by all who ask: never write to it.
    """
    return _matrix(size, like.dtype, like.device)


def dct2(X: Tensor) -> Tensor:
    """2-D DCT-II of the last two dimensions: C_p X C_q^T."""
    return dct_matrix(X.shape[-2], X) @ X @ dct_matrix(X.shape[-1], X).mT


def idct2(K: Tensor) -> Tensor:
    """Its inverse: C_p^T K C_q."""
    return dct_matrix(K.shape[-2], K).mT @ K @ dct_matrix(K.shape[-1], K)


@lru_cache(maxsize=32)
def _matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if size > LARGEST:
        raise UserError(f"a side of {size} is too long for a cosine transform (at most {LARGEST}): leave that layer out of the targets")
    with torch.inference_mode(False):  # the first to ask may be a validation pass, and training must be able to save it for backward
        i = torch.arange(size, dtype=torch.int64)
        # the angle's whole turns are taken off in integers, where nothing is lost
        turns = torch.outer(i, 2 * i + 1).remainder_(4 * size).double()
        C = (turns * (torch.pi / (2 * size))).cos_() * (2 / size) ** 0.5
        C[0] /= 2**0.5
        return C.to(device=device, dtype=dtype)
