"""One training step of SAM ViT-B with random weights: LoRA on the fused qkv of every block, against Hugging Face PEFT's on stock SAM.

    python scripts/bench_sam.py --sizes 256 512                    # step times and memory
    python scripts/bench_sam.py --sizes 1024 --memory-only         # peak memory where an image has 4096 tokens

The mask decoder is trained whole in every variant, without prompts. `floor` is the frozen encoder with a gradient to its patches;
`decoder` trains the decoder alone on images, `cached` on embeddings that were computed before. `peft` is segment-anything's own encoder.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from benching import in_fresh_process, interleave, peak_of, ratio
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from vision_peft.adapters.full import Full
from vision_peft.adapters.lora import LoRA
from vision_peft.backbones import Sam
from vision_peft.engine.install import attach

VARIANTS = ("floor", "lora", "decoder", "cached", "peft")
RANK = 4


def stock_encoder(backbone: Sam) -> nn.Module:
    """segment-anything's encoder with PEFT's LoRA in it, and the same weights."""
    from peft import LoraConfig, get_peft_model

    norm = partial(nn.LayerNorm, eps=1e-6)
    shape = {"embed_dim": 768, "depth": 12, "num_heads": 12, "window_size": 14, "global_attn_indexes": (2, 5, 8, 11)}
    encoder = ImageEncoderViT(img_size=backbone.image_size, use_rel_pos=True, norm_layer=norm, **shape)
    encoder.load_state_dict(backbone.network.image_encoder.state_dict())
    return get_peft_model(encoder.requires_grad_(False), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv"]))


def stepper(variant: str, size: int, batch: int, precision: str) -> Callable[[], None]:
    torch.manual_seed(0)
    backbone = Sam("vit_b", image_size=size)
    backbone.load()
    for name, parameter in backbone.network.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.02)  # they start at zero
    network, images = backbone.train().network, torch.randn(batch, 3, size, size)
    trained: list[nn.Parameter] = []
    encode: Callable[[], Tensor] = lambda: backbone(images)
    if variant == "peft":
        encoder = stock_encoder(backbone)
        trained += [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        encode = lambda: encoder(images)
    elif variant == "lora":
        trained += attach(network, LoRA(rank=RANK, alpha=float(RANK)), "vision.*.attn.qkv", sites=backbone.sites()).parameters()
    elif variant == "floor":
        trained.append(network.image_encoder.pos_embed.requires_grad_(True))
    elif variant == "cached":
        with torch.no_grad():
            embedding = backbone(images)
        encode = lambda: embedding
    if variant != "floor":
        beside = attach(network, Full(), "decoder.*", sites=backbone.sites(), name="trained", beside=variant == "lora")
        trained += beside.parameters()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = backbone.decode(encode()).logits.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="*", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--memory-only", action="store_true", help="of lora and peft")
    parser.add_argument("--memory", nargs=3, metavar=("VARIANT", "SIZE", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        variant, size, precision = args.memory
        print(peak_of(stepper(variant, int(size), args.batch, precision)))
        return
    print(f"SAM ViT-B, {args.batch} image(s), LoRA r={RANK} on qkv, decoder trained, {args.threads} thread(s), torch {torch.__version__}, "
          f"{platform.machine()}, {time.strftime('%Y-%m-%d')}")  # fmt: skip
    for size in args.sizes:
        for precision in args.precision:
            chosen = ("lora", "peft") if args.memory_only else VARIANTS
            words = ("--batch", str(args.batch))
            memory = {each: in_fresh_process(__file__, *words, "--memory", each, str(size), precision) for each in chosen}
            if args.memory_only:
                ours, theirs = memory["lora"], memory["peft"]
                print(f"{size} px, {precision}: lora {ours:.0f} MiB, {ours / theirs:.2f} x PEFT's {theirs:.0f}")
                continue
            seconds = interleave({each: stepper(each, size, args.batch, precision) for each in VARIANTS}, args.rounds)
            print(f"\n{size} px, {precision:9s} {'s/step':>8s} {'x floor':>8s} {'x PEFT':>8s} {'x decoder':>9s} {'MiB':>8s} {'x PEFT':>8s}")
            for each in VARIANTS:
                ratios = [ratio(seconds, each, other) for other in ("floor", "peft", "decoder")]
                share = memory[each] / memory["peft"]
                print(f"{each:17s} {statistics.median(seconds[each]):8.3f} {ratios[0]:8.2f} {ratios[1]:8.2f} {ratios[2]:9.2f} "
                      f"{memory[each]:8.0f} {share:8.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
