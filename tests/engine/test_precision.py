"""bf16-mixed in a config runs as float32 where the processor would only imitate bfloat16, and says so."""

from __future__ import annotations

import warnings

import pytest
import torch

from vision_peft.engine import precision


@pytest.fixture
def processor(monkeypatch):
    def set_to(has_bfloat16: bool) -> None:
        monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has_bfloat16)

    return set_to


def test_without_instructions_float32_is_announced(processor):
    processor(False)
    with pytest.warns(UserWarning, match="trainer.precision: .* 32-true is used"):
        assert precision.computable("bf16-mixed", "cpu") == "32-true"


@pytest.mark.parametrize("wanted, accelerator, has", [
    ("bf16-mixed", "cpu", True), ("bf16-mixed", "gpu", False), ("bf16-true", "cpu", False), ("32-true", "cpu", False),
    (None, "auto", False),
])  # fmt: skip
def test_all_else_is_left_alone(wanted, accelerator, has, processor):
    processor(has)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert precision.computable(wanted, accelerator) == wanted


def test_this_processor_is_asked():
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        assert not precision.cpu_has_bfloat16()
    if torch.cpu._is_avx512_bf16_supported():
        assert precision.cpu_has_bfloat16()
