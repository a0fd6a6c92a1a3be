"""The C library's memory, where PyTorch's tensors of a processor lie."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks of any size for the next tensor instead of returning them to the system (glibc; else nothing).

    Activations of a large picture are hundreds of MiB that come and go with every layer, and a page that the system gives anew it first
    fills with zeros: that was half of the time of EfficientNet-Lite0 on 512 x 512 pixels. The process does not shrink after its peak.
    """
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Give the system back what the C library keeps of freed blocks (glibc; else nothing)."""
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
