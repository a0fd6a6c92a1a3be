"""One training step of CLIP ViT-B/16, both towers adapted, against Hugging Face PEFT's LoRA of nn.MultiheadAttention on the same network.

    python scripts/bench_clip.py                        # 16 images, 100 classes, rank 2, float32 and bf16 autocast
    python scripts/bench_clip.py --rounds 3 --precision bf16

Every variant encodes the images and the 100 prompts with gradients and takes one AdamW step. `short` lets the text tower run to the
longest prompt (14 tokens here), `full` to all 77 positions as PEFT must. `floor` is the frozen network with one trained number before the
first block of each tower, prompts short. Adapted are q, k, v and the output of every attention, as PEFT's layer does it.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import open_clip
import torch
import torch.nn.functional as F
from benching import in_fresh_process, interleave, peak_of, ratio
from torch import Tensor, nn

from vision_peft.adapters.block_lora import BlockLoRA
from vision_peft.adapters.lora import LoRA
from vision_peft.backbones import Clip
from vision_peft.engine.install import attach

MODEL, CLASSES = "ViT-B-16", 100
METHODS = {"lora": LoRA, "block_lora": BlockLoRA}  # without dropout, which PEFT's layer has not either
VARIANTS = ("floor", "lora short", "lora full", "block_lora short", "block_lora full", "peft")


def ours(variant: str, rank: int, tokens: Tensor) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """Images -> logits, and what is trained."""
    backbone = Clip(MODEL)
    backbone.load()
    method, _, length = variant.partition(" ")
    network = backbone.train().network
    if method == "floor":
        trained = [network.visual.class_embedding, network.positional_embedding]
        for parameter in trained:
            parameter.requires_grad_(True)
    else:
        trained = list(attach(network, METHODS[method](rank=rank, dropout=0.0), "attn", sites=backbone.sites()).parameters())
    kept = tokens if length == "full" else tokens[:, : network.needed(tokens)]
    return lambda images: logits(backbone(images), backbone.encode_text(kept)), trained


def peft(rank: int, tokens: Tensor) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
    from peft import LoraConfig, get_peft_model

    network = open_clip.create_model(MODEL)
    network.requires_grad_(False)
    modules = [name for name, module in network.named_modules() if isinstance(module, nn.MultiheadAttention)]
    network = get_peft_model(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=modules)).base_model.model
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return lambda images: logits(network.encode_image(images), network.encode_text(tokens)), trained


def logits(images: Tensor, texts: Tensor) -> Tensor:
    return 100 * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).mT


def stepper(variant: str, precision: str, args: argparse.Namespace) -> Callable[[], None]:
    torch.manual_seed(0)
    prompts = [f"a photo of a {name}." for name in open_clip.IMAGENET_CLASSNAMES[:CLASSES]]
    tokens = open_clip.get_tokenizer(MODEL)(prompts)
    forward, trained = peft(args.rank, tokens) if variant == "peft" else ours(variant, args.rank, tokens)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    images, labels = torch.randn(args.batch, 3, 224, 224), torch.randint(CLASSES, (args.batch,))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(forward(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="*", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--memory", nargs=2, metavar=("VARIANT", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # random weights are meant
    if args.memory:
        print(peak_of(stepper(*args.memory, args)))
        return
    print(f"{MODEL}, {args.batch} images, {CLASSES} classes, rank {args.rank} on every attention of both towers, {args.threads} thread(s), "
          f"torch {torch.__version__}, {platform.machine()}, {time.strftime('%Y-%m-%d')}")  # fmt: skip
    for precision in args.precision:
        seconds = interleave({variant: stepper(variant, precision, args) for variant in VARIANTS}, args.rounds)
        words = ("--rank", str(args.rank), "--batch", str(args.batch))
        memory = {variant: in_fresh_process(__file__, "--memory", variant, precision, *words) for variant in VARIANTS}
        print(f"\n{precision:16s} {'s/step':>8s} {'x floor':>8s} {'x PEFT':>8s} {'MiB':>8s} {'x PEFT':>8s}")
        for variant in VARIANTS:
            floor, other = (ratio(seconds, variant, name) for name in ("floor", "peft"))
            share = memory[variant] / memory["peft"]
            print(f"{variant:16s} {statistics.median(seconds[variant]):8.3f} {floor:8.2f} {other:8.2f} {memory[variant]:8.0f} {share:8.2f}")


if __name__ == "__main__":
    main()
