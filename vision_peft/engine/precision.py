"""bfloat16 where the processor has it: elsewhere autocast imitates it, and turns minutes into hours."""

from __future__ import annotations

import warnings
from functools import cache

import torch


@cache
def cpu_has_bfloat16() -> bool:
    """Whether torch has kernels for products in bfloat16 on this processor; x86 needs AVX-512 at least.

    Elsewhere reference loops run: on an AVX2 EPYC a product of two 1024 x 1024 matrices took 2.2 s against 0.03 s in float32.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computable(precision: str | int | None, accelerator: str) -> str | int | None:
    """Lightning's `precision` for a run, which is 32-true, with a warning, where a CPU would only imitate bf16-mixed.

    A config with bf16-mixed is thus fit for every machine. `bf16-true` is left alone: there the stored weights are meant.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available() and not torch.backends.mps.is_available())
    if precision not in ("bf16-mixed", "bf16") or not on_cpu or cpu_has_bfloat16():
        return precision
    warnings.warn("trainer.precision: this processor has no bfloat16 instructions, which bf16-mixed needs; 32-true is used", stacklevel=2)
    return "32-true"
