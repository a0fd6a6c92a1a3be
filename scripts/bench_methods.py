"""One training step of ViT-S/16 with every method of the catalogue, against the floor, LoRA, and the same method in Hugging Face PEFT.

    OMP_NUM_THREADS=1 python scripts/bench_methods.py   # all methods, times; appends to docs/rows/speed_methods.csv as it goes
    OMP_NUM_THREADS=1 python scripts/bench_methods.py --memory            # peak memory of each in a fresh process, into the same file
    OMP_NUM_THREADS=1 python scripts/bench_methods.py --only vera randlora --precision float32
    python scripts/bench_methods.py --write                              # docs/speed_methods.md, and the costs `vision-peft methods` prints

All Linear layers of all blocks are adapted, with the YAML's settings for the method (configs/method). A step is forward, backward,
the method's hooks and AdamW. For each method its variants (floor, LoRA, the method, PEFT's) are interleaved in rounds with a rotating
start; ratios are formed inside a round and their median is kept. Seconds are CPU seconds of this process. Peak memory is the largest
resident size during two steps, less that of the loaded model (Linux). A method that is in the file already is skipped.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import timm
import torch
import yaml
from benching import LAYERS, PEFT_LAYERS, in_fresh_process, interleave, peak_of, ratio
from torch import nn

from vision_peft.engine.adapter import Clock, Method, find_method, method_names
from vision_peft.engine.install import AdapterSet, attach

ROWS = Path("docs/rows/speed_methods.csv")
PAGE = Path("docs/speed_methods.md")
COSTS = Path("vision_peft/commands/method_costs.csv")
FIELDS = ["method", "precision", "seconds", "floor", "lora", "peft", "mib", "mib_floor", "mib_lora", "mib_peft"]
MODEL, BATCH = "vit_small_patch16_224", 16


def method_of(name: str) -> Method:
    """With the settings of configs/method/NAME.yaml."""
    given = yaml.safe_load(Path(f"configs/method/{name}.yaml").read_text())["adapter"]["method"]
    return find_method(name)(**given.get("init_args", {}))


def peft_config(name: str, method: Method) -> object | None:
    """PEFT's configuration for the same method and size; None where PEFT has no such method."""
    import peft

    rank = getattr(method, "rank", 8)
    common = {"target_modules": PEFT_LAYERS}
    made: dict[str, Callable[[], object]] = {
        "lora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, **common),
        "dora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, use_dora=True, **common),
        "adalora": lambda: peft.AdaLoraConfig(init_r=rank, target_r=max(1, rank * 2 // 3), total_step=1000, **common),
        "vera": lambda: peft.VeraConfig(r=rank, **common),
        "randlora": lambda: peft.RandLoraConfig(r=rank, **common),
        "loha": lambda: peft.LoHaConfig(r=rank, alpha=rank, **common),
        "lokr": lambda: peft.LoKrConfig(r=rank, alpha=rank, **common),
        "fourier_ft": lambda: peft.FourierFTConfig(n_frequency=getattr(method, "coefficients", 1000), **common),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=32, **common),
        "boft": lambda: peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=1, **common),
        "hra": lambda: peft.HRAConfig(r=rank, **common),
        "ia3": lambda: peft.IA3Config(target_modules=PEFT_LAYERS, feedforward_modules=[]),
        "c3a": lambda: peft.C3AConfig(block_size=getattr(method, "block_size", 128), **common),
    }
    return made[name]() if name in made else None


def build(variant: str, name: str) -> tuple[nn.Module, list[nn.Parameter], AdapterSet | None]:
    """The network with a trainable head, what is trained, and our adapter set where there is one."""
    torch.manual_seed(0)
    network = timm.create_model(MODEL, num_classes=100)
    network.requires_grad_(False)
    adapters, head = None, network.head
    if variant == "floor":
        trained = [network.patch_embed.proj.bias.requires_grad_()]  # one vector before the first block: the gradient passes through all
    elif variant == "peft":
        from peft import get_peft_model

        network = get_peft_model(network, peft_config(name, method_of(name)))
        trained = [p for p in network.parameters() if p.requires_grad]
        head = network.base_model.model.head
    else:
        # evidence changes the start, not the cost: none is collected here
        adapters = attach(network, method_of("lora" if variant == "lora" else name), LAYERS, restoring=True)
        trained = [p for p in adapters.parameters() if p.requires_grad]
    head.requires_grad_(True)
    return network, list({id(p): p for p in [*trained, *head.parameters()]}.values()), adapters


def stepper(variant: str, name: str, precision: str) -> Callable[[], None]:
    network, trained, adapters = build(variant, name)
    network.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    images, labels = torch.randn(BATCH, 3, 224, 224), torch.randint(100, (BATCH,))
    done = 0

    def step() -> None:
        nonlocal done
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = nn.functional.cross_entropy(network(images), labels)
        if adapters is not None:
            loss = loss + adapters.penalty()
        loss.backward()
        if adapters is not None:
            adapters.adjust_gradients(Clock(done, 1000, 0, optimizer))
        optimizer.step()
        done += 1
        if adapters is not None:
            adapters.coordinate(Clock(done, 1000, 0, optimizer))
        optimizer.zero_grad(set_to_none=True)

    return step


def variants(name: str) -> list[str]:
    return ["floor", "lora", "ours", *(["peft"] if peft_config(name, method_of(name)) is not None else [])]


def time_method(name: str, precision: str, rounds: int) -> dict[str, str]:
    seconds = interleave({variant: stepper(variant, name, precision) for variant in variants(name)}, rounds)
    found = {"seconds": f"{statistics.median(seconds['ours']):.3f}"}
    return found | {other: f"{ratio(seconds, 'ours', other):.2f}" for other in seconds if other != "ours"}


@cache
def peak(variant: str, name: str, precision: str) -> float:
    return in_fresh_process(__file__, "--measure", variant, name, precision)


def memory_of(name: str, precision: str) -> dict[str, str]:
    """Floor and LoRA are measured once for all methods: a peak, unlike a time, does not depend on what else the machine does."""
    peaks = {variant: peak(variant, "lora" if variant in ("floor", "lora") else name, precision) for variant in variants(name)}
    others = {f"mib_{other}": f"{peaks['ours'] / value:.2f}" for other, value in peaks.items() if other != "ours"}
    return {"mib": f"{peaks['ours']:.0f}"} | others


def rows() -> dict[tuple[str, str], dict[str, str]]:
    found = csv.DictReader(ROWS.open()) if ROWS.is_file() else []
    return {(row["method"], row["precision"]): row for row in found}


def keep(found: dict[tuple[str, str], dict[str, str]]) -> None:
    with ROWS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(found[key] for key in sorted(found))


def write_page() -> None:
    found = rows()
    with COSTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "step of LoRA's, float32", "step of LoRA's, bf16"])
        for name in sorted({method for method, _ in found}):
            writer.writerow([name, *(found.get((name, precision), {}).get("lora", "") for precision in ("float32", "bf16"))])
    text = (
        "# What a step costs, method by method\n\n"
        f"`scripts/bench_methods.py`: {MODEL}, batch {BATCH}, every Linear of every block, settings of configs/method; "
        f"{platform.machine()}, one thread, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.\n"
        "Ratios of the step to the floor's (frozen forward pass and input gradient), to LoRA's of the same rounds, and to Hugging Face\n"
        "PEFT's for the same method; memory likewise.\n"
    )
    head = "| method | s/step | x floor | x LoRA | x PEFT | MiB | x floor | x LoRA | x PEFT |\n|---|---|---|---|---|---|---|---|---|\n"
    for precision in ("float32", "bf16"):
        text += f"\n## {precision}\n\n{head}"
        for (name, kind), row in sorted(found.items(), key=lambda item: float(item[1]["floor"] or 0)):
            if kind == precision:
                text += f"| {' | '.join([name, *(row[field] for field in FIELDS[2:])])} |\n"
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=method_names(), help="methods")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="*", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of times")
    parser.add_argument("--write", action="store_true", help="write the page from the rows")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.write:
        write_page()
        return
    if args.measure:
        print(peak_of(stepper(*args.measure)))
        return
    for name in args.only:
        for precision in args.precision:
            row = rows().get((name, precision), {"method": name, "precision": precision})
            if row.get("mib" if args.memory else "seconds"):
                continue
            row |= memory_of(name, precision) if args.memory else time_method(name, precision, args.rounds)
            keep(rows() | {(name, precision): row})
            print(" ".join(f"{key} {value}" for key, value in row.items() if value), flush=True)


if __name__ == "__main__":
    main()
