"""One training step of diffusers' UNets with LoRA: ours against the same network with Hugging Face PEFT's, and against the frozen one.

    python scripts/bench_generator.py

`faces` is the shape that train_offline_ddpm.py trains, at 64 pixels, with LoRA on attention and the convolutions of its ResNets; `text` a
small Stable Diffusion-like UNet2DConditionModel on latents of 32 x 32, with LoRA on every attention projection; `sd15` Stable Diffusion
1.5's own shape there (256 pixels; 860 M parameters, 4 GB a variant: `--batch 2`). `floor` is our frozen network with a gradient to its
first convolution's bias; PEFT's is diffusers' as it comes. `sd15conv` adapts the ResNets' convolutions, too. Random weights: the time does
not depend on them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benching import in_fresh_process, interleave, peak_of, ratio
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from train_offline_ddpm import NOISE, PIXELS, SHAPE

from vision_peft.adapters.lora import LoRA
from vision_peft.backbones import Diffusion
from vision_peft.engine.install import attach

VARIANTS, RANK = ("floor", "lora", "peft"), 8
TEXT = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 256),
    "layers_per_block": 1,
    "cross_attention_dim": 256,
    "attention_head_dim": (2, 4, 8),  # the number of heads, in spite of its name
    "norm_num_groups": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
SD15 = {"sample_size": 32, "cross_attention_dim": 768}  # else diffusers' defaults
SHAPES = {"faces": {**SHAPE, **PIXELS}, "text": TEXT, "sd15": SD15, "sd15conv": SD15}
ATTENTION, BOTH = (["attn"], r".*(to_[qkv]|to_out\.0)"), (["attn", "unet.*.conv{1,2}"], r".*(to_[qkv]|to_out\.0|resnets\.\d+\.conv[12])")
TARGETS = {"faces": BOTH, "text": ATTENTION, "sd15": ATTENTION, "sd15conv": BOTH}  # ours and PEFT's


def stepper(variant: str, shape: str, batch: int, precision: str) -> Callable[[], None]:
    torch.manual_seed(0)
    network = (UNet2DModel if shape == "faces" else UNet2DConditionModel)(**SHAPES[shape])
    with tempfile.TemporaryDirectory() as folder:
        DDIMPipeline(network, DDIMScheduler(**NOISE)).save_pretrained(folder)
        backbone = Diffusion(str(Path(folder) / "unet"), scheduler="DDIMScheduler")
        backbone.load()
        for parameter in backbone.parameters():
            parameter.data = parameter.data.clone()  # mapped from the file, their pages would count as the step's memory
    condition = {} if shape == "faces" else {"encoder_hidden_states": torch.randn(batch, 77, network.config.cross_attention_dim)}
    if variant == "peft":
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS[shape][1])
        network = inject_adapter_in_model(config, network.requires_grad_(False))
        trained = [parameter for name, parameter in network.named_parameters() if "lora_" in name]
        backbone.network = network
    elif variant == "lora":
        trained = list(attach(backbone.network, LoRA(rank=RANK, alpha=float(RANK)), TARGETS[shape][0], sites=backbone.sites()).parameters())
    else:
        trained = [backbone.network.conv_in.bias.requires_grad_(True)]
    optimizer, x = torch.optim.AdamW(trained, lr=1e-4), torch.randn(batch, backbone.channels, *backbone.sample_size)
    target, t = torch.randn(x.shape), torch.randint(0, 1000, (batch,))
    backbone.train()

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = backbone(x, t, condition)
        (output.float() - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["faces", "text"], choices=list(SHAPES))
    parser.add_argument("--precision", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--memory", nargs=3, metavar=("VARIANT", "SHAPE", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        variant, shape, precision = args.memory
        print(peak_of(stepper(variant, shape, args.batch, precision)))
        return
    print(f"LoRA r={RANK}, {args.batch} pictures, {args.threads} thread(s), torch {torch.__version__}, {platform.machine()}, "
          f"{time.strftime('%Y-%m-%d')}")  # fmt: skip
    for shape in args.shapes:
        for precision in args.precision:
            words = ("--batch", str(args.batch))
            memory = {each: in_fresh_process(__file__, *words, "--memory", each, shape, precision) for each in VARIANTS}
            seconds = interleave({each: stepper(each, shape, args.batch, precision) for each in VARIANTS}, args.rounds)
            print(f"\n{shape}, {precision:9s} {'s/step':>8s} {'x floor':>8s} {'x PEFT':>8s} {'MiB':>8s} {'x PEFT':>8s}")
            for each in VARIANTS:
                ratios = [ratio(seconds, each, other) for other in ("floor", "peft")]
                print(f"{each:16s} {statistics.median(seconds[each]):8.3f} {ratios[0]:8.2f} {ratios[1]:8.2f} "
                      f"{memory[each]:8.0f} {memory[each] / memory['peft']:8.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
