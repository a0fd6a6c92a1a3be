"""What the benchmarks share: interleaved rounds in CPU seconds, ratios inside a round, and peak memory of a fresh process."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from vision_peft.allocator import return_freed_memory
from vision_peft.engine.targets import expand

# every Linear of every block of a timm vision transformer
LAYERS = [name for layer in ("attn.{q,k,v}", "attn.proj", "mlp.fc1", "mlp.fc2") for name in expand(f"blocks.*.{layer}")]
PEFT_LAYERS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def interleave(steps: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds by name: every round runs each step once, in rotating order, after one step each to warm up."""
    for step in steps.values():
        step()
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            before = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - before)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, other: str) -> float:
    """Median over rounds of the ratio inside a round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other]))


def in_fresh_process(script: str, *words: str) -> float:
    """The number that a script prints last."""
    return float(subprocess.run([sys.executable, script, *words], check=True, capture_output=True, text=True).stdout.split()[-1])


def peak_of(step: Callable[[], None]) -> float:
    """MiB that two steps reach over what is resident now (Linux)."""
    gc.collect()
    return_freed_memory()  # left from building the networks, it would serve the step unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    loaded = _peak_kib()
    for _ in range(2):
        step()
    return (_peak_kib() - loaded) / 1024


def _peak_kib() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
