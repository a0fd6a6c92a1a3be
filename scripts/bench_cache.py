"""What cached hidden states save: a training step of ViT-S/16 with LoRA in the last k of 12 blocks, from pictures and from the cache.

    python scripts/bench_cache.py

Variants are interleaved in rounds; the ratio to the step with adapters in all 12 blocks is formed inside a round, and its median is
printed. Seconds are CPU seconds of this process, one thread. Losses of both ways are compared as well: the cache is exact.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vision_peft.adapters.lora import LoRA
from vision_peft.backbones import Vit
from vision_peft.engine.install import attach

DEPTH = 12


def stepper(last: int, cached: bool, precision: str, batch: int) -> Callable[[], float]:
    """A step with adapters in the last `last` blocks, which gives its loss."""
    torch.manual_seed(0)
    backbone = Vit("vit_small_patch16_224", pretrained=False)
    backbone.load()
    adapters = attach(backbone.network, LoRA(rank=8), f"vision.{{{DEPTH - last}..{DEPTH - 1}}}.*", sites=backbone.sites())
    head = nn.Linear(backbone.num_features, 100)
    optimizer = torch.optim.AdamW([*adapters.parameters(), *head.parameters()], lr=1e-4)
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(100, (batch,))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    with torch.no_grad(), autocast:
        hidden = backbone.prefix(images, DEPTH - last)

    def features() -> Tensor:
        return backbone.suffix(hidden, DEPTH - last) if cached else backbone(images)

    def step() -> float:
        with autocast:
            loss = nn.functional.cross_entropy(head(features()), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"ViT-S/16, batch {args.batch}, LoRA r=8, 1 thread, torch {torch.__version__}, {platform.machine()}, {time.strftime('%Y-%m-%d')}")
    variants = {(last, cached): cached for last in (12, 6, 3, 1) for cached in ((False,) if last == 12 else (False, True))}
    for precision in ("float32", "bf16"):
        steps = {key: stepper(*key, precision, args.batch) for key in variants}
        losses = {key: step() for key, step in steps.items()}
        seconds: dict[tuple[int, bool], list[float]] = {key: [] for key in variants}
        for _ in range(args.rounds):
            for key, step in steps.items():
                start = time.process_time()
                step()
                seconds[key].append(time.process_time() - start)
        print(f"\n{precision:8s} {'from pictures':>14s} {'x all 12':>9s} {'from cache':>11s} {'x all 12':>9s} {'loss differs by':>16s}")
        for last in (12, 6, 3, 1):
            cells = [f"last {last:2d} "]
            for cached in (False, True):
                if (last, cached) in seconds:
                    ratio = statistics.median(a / b for a, b in zip(seconds[last, cached], seconds[12, False]))
                    cells.append(f"{statistics.median(seconds[last, cached]):{14 if not cached else 11}.3f} {ratio:9.2f}")
            if last < DEPTH:
                cells.append(f"{abs(losses[last, True] - losses[last, False]):16.1e}")
            print(" ".join(cells))


if __name__ == "__main__":
    main()
