"""One training step of ViT-S/16 with LoRA against the floor (frozen forward + input gradient) and against Hugging Face PEFT.

    python scripts/bench_step.py                       # float32 and bf16 autocast, batch 16, rank 8 on every Linear of every block
    python scripts/bench_step.py --method dora --rounds 7

Variants are interleaved: every round runs each once, in rotating order; ratios are formed inside a round and their median
is printed. Seconds are CPU seconds of this process, so that other work on the machine disturbs least. Peak memory is
measured in a fresh process per variant: the largest resident size during two steps, less that of the loaded model (Linux).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
from benching import LAYERS, PEFT_LAYERS, in_fresh_process, interleave, peak_of, ratio
from torch import nn

from vision_peft.engine.adapter import find_method
from vision_peft.engine.install import attach

VARIANTS = ("floor", "ours", "peft", "full")


def build(variant: str, args: argparse.Namespace) -> tuple[nn.Module, list[nn.Parameter]]:
    """The network with a trainable head, and what is trained besides it."""
    torch.manual_seed(0)
    network = timm.create_model(args.model, num_classes=100)
    network.requires_grad_(False)
    trained: list[nn.Parameter] = []
    if variant == "ours":
        trained = list(attach(network, find_method(args.method)(rank=args.rank), LAYERS).parameters())
    elif variant == "peft":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=PEFT_LAYERS, use_dora=args.method == "dora")
        network = get_peft_model(network, config)
        trained = [p for p in network.parameters() if p.requires_grad]
    elif variant == "full":
        network.requires_grad_(True)
        trained = list(network.parameters())
    elif variant == "floor":
        trained = [network.patch_embed.proj.bias]  # one number before the first block: the gradient must pass through all of them
        trained[0].requires_grad_(True)
    head = network.base_model.model.head if variant == "peft" else network.head
    head.requires_grad_(True)
    return network, list({id(p): p for p in [*trained, *head.parameters()]}.values())


def stepper(variant: str, precision: str, args: argparse.Namespace) -> Callable[[], None]:
    network, trained = build(variant, args)
    network.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    images, labels = torch.randn(args.batch, 3, 224, 224), torch.randint(100, (args.batch,))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_steps(precision: str, args: argparse.Namespace) -> dict[str, list[float]]:
    return interleave({variant: stepper(variant, precision, args) for variant in VARIANTS}, args.rounds)


def peak_memory(variant: str, precision: str, args: argparse.Namespace) -> float:
    """MiB over the loaded model, in a fresh process."""
    words = ["--memory", variant, precision, "--method", args.method, "--rank", str(args.rank)]
    return in_fresh_process(__file__, *words, "--batch", str(args.batch), "--model", args.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--method", default="lora", choices=["lora", "dora"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="*", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--memory", nargs=2, metavar=("VARIANT", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(peak_of(stepper(*args.memory, args)))
        return
    print(f"{args.model}, batch {args.batch}, {args.method} r={args.rank} on every Linear of every block, {args.threads} thread(s), "
          f"torch {torch.__version__}, {platform.machine()}, {time.strftime('%Y-%m-%d')}")
    for precision in args.precision:
        seconds = time_steps(precision, args)
        memory = {variant: 0.0 if args.no_memory else peak_memory(variant, precision, args) for variant in VARIANTS}
        print(f"\n{precision:8s} {'s/step':>8s} {'x floor':>8s} {'x PEFT':>8s} {'MiB':>8s} {'x PEFT':>8s}")
        for variant in VARIANTS:
            floor, peft = (ratio(seconds, variant, other) for other in ("floor", "peft"))
            share = memory[variant] / memory["peft"] if memory["peft"] else float("nan")
            print(f"{variant:8s} {statistics.median(seconds[variant]):8.3f} {floor:8.2f} {peft:8.2f} {memory[variant]:8.0f} {share:8.2f}")


if __name__ == "__main__":
    main()
