"""Thin SVDs of frozen weights, kept on disk under the hash of the weight: decomposed once a backbone, not once a run."""

from __future__ import annotations

import hashlib

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vision_peft.linalg.svd import SVD, thin_svd
from vision_peft.user_cache import cache_folder, keep_tensors

SMALLEST = 128 * 128  # entries; below, decomposing is as quick as reading a file
_ALGORITHM = "gram-float64-1"  # part of the key: another way of decomposing may choose other signs


def cached_svd(W: Tensor) -> SVD:
    """thin_svd(W), from the user's cache where it has been computed before; W (out, in) float32.

    Signs and order are those of the first computation, so runs that share a cache share a basis. A file takes 4 p (out + in + 1)
    bytes, p = min(out, in): 0.5 GB for the linear layers of a ViT-B. A damaged file is computed anew.
    """
    if W.numel() < SMALLEST:
        return thin_svd(W)
    path = cache_folder("svd") / f"{_key(W)}.safetensors"
    try:
        stored = load_file(path)
        return SVD(*(stored[name].to(W.device) for name in ("U", "S", "Vh")))
    except (FileNotFoundError, SafetensorError, KeyError):
        found = thin_svd(W)
    keep_tensors(path, found._asdict())
    return found


def _key(W: Tensor) -> str:
    own = W.detach().cpu().contiguous()
    return hashlib.sha256(f"{_ALGORITHM} {tuple(W.shape)} {W.dtype} ".encode() + own.numpy().tobytes()).hexdigest()[:32]
