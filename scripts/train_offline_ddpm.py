"""A small unconditional generator of faces in diffusers' format: UNet2DModel, 64 x 64, 3.4 million parameters, from random weights.

    VISION_PEFT_DATA=... python scripts/train_offline_ddpm.py --folder checkpoints/offline_ddpm
    VISION_PEFT_DATA=... python scripts/train_offline_ddpm.py --images gen_anime/split.csv --folder checkpoints/offline_ddpm_anime
    VISION_PEFT_DATA=... python scripts/train_offline_ddpm.py --autoencoder TAEF2 --folder checkpoints/offline_latent_ddpm    # 128 x 128

x_t = sqrt(abar) x + sqrt(1 - abar) eps,  v = sqrt(abar) eps - sqrt(1 - abar) x,  L = min(SNR, 5) / (SNR + 1) |v_theta(x_t, t) - v|^2

with the cosine schedule, because a clean picture estimated in one step from v is well behaved at every t, which adaptation by pictures
needs (from eps it is not where abar is near 0). Pictures are mirrored half of the time; what is saved is the average of the weights.

Every 500 steps FOLDER/work/last.pt is written, atomically; the same command goes on from there, and draws depend on seed and step alone.
FOLDER/work has log.csv (loss, and the loss of held-out pictures under fixed noise by averaged weights) and sample grids as it goes.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid, save_image
from tqdm.auto import tqdm

from vision_peft.backbones.tiny_autoencoder import SCALE, STATISTICS, TinyAutoencoder, load_tiny_autoencoder
from vision_peft.data.roots import existing
from vision_peft.engine.precision import cpu_has_bfloat16
from vision_peft.engine.store import staged_folder
from vision_peft.user_cache import kept_tensors

BATCH, RATE, WARMUP, AVERAGE, GAMMA, EVERY = 8, 4e-4, 200, 0.999, 5.0, 500
SHAPE = {"layers_per_block": 1, "attention_head_dim": 32, "norm_num_groups": 8}
PIXELS = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (24, 48, 96, 128),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
}
LATENTS = {
    "sample_size": 16,
    "in_channels": 32,
    "out_channels": 32,
    "block_out_channels": (96, 128, 192),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}
NOISE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@dataclass
class Pictures:
    """What the network learns.

    Attributes:
        views: (2, N, C, h, w), uint8 pixels or float latents, as they are and mirrored.
        held_out: (M, C, h, w).
        autoencoder: None: of pixels.
    """

    views: Tensor
    held_out: Tensor
    autoencoder: TinyAutoencoder | None = None

    @property
    def unet(self) -> dict[str, Any]:
        return SHAPE | (PIXELS if self.autoencoder is None else LATENTS)

    @property
    def noise(self) -> dict[str, Any]:
        return NOISE | {"clip_sample": self.autoencoder is None}

    @torch.no_grad()
    def shown(self, x: Tensor) -> Tensor:
        """Pictures in [0, 1] of what the network works on."""
        if self.autoencoder is not None:
            latents = x * self.autoencoder.std + self.autoencoder.mean
            x = torch.cat([self.autoencoder.decode(part)[0] for part in latents.split(BATCH)])
        return x.clamp(-1, 1) / 2 + 0.5


def read(file: str, domain: str | None, size: int) -> dict[str, Tensor]:
    """uint8 (N, 3, size, size) of the rows called train and val."""
    path = existing(file, "--images")
    found: dict[str, list[Tensor]] = {"train": [], "val": []}
    for row in csv.DictReader(path.open()):
        if row["split"] in found and row.get("domain", domain) == domain:
            picture = Image.open(path.parent / row["path"]).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            found[row["split"]].append(pil_to_tensor(picture))
    return {split: torch.stack(pictures) for split, pictures in found.items()}


@torch.no_grad()
def encoded(images: dict[str, Tensor], autoencoder: TinyAutoencoder, kept: Path) -> Pictures:
    """Latents with mean 0 and deviation 1 in every channel over the pictures that are trained on; computed once, into the file `kept`."""

    def encode(pictures: Tensor) -> Tensor:
        return torch.cat([autoencoder.encode(part / 127.5 - 1).latents for part in tqdm(pictures.split(BATCH), "autoencoder")])

    def compute() -> dict[str, Tensor]:
        return {"views": torch.stack([encode(images["train"]), encode(images["train"].flip(3))]), "held_out": encode(images["val"])}

    found = kept_tensors(kept, compute)
    views, held_out = found["views"], found["held_out"]
    autoencoder.mean, autoencoder.std = (each[:, None, None] for each in (views.mean((0, 1, 3, 4)), views.std((0, 1, 3, 4))))
    return Pictures(*((each - autoencoder.mean) / autoencoder.std for each in (views, held_out)), autoencoder)


def loss_of(unet: nn.Module, scheduler: DDIMScheduler, images: Tensor, draw: torch.Generator) -> Tensor:
    """Of (B, C, h, w), uint8 pixels or float latents."""
    clean = images / 127.5 - 1 if images.dtype == torch.uint8 else images
    noise = torch.randn(clean.shape, generator=draw)
    steps = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),), generator=draw)
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
        velocity = unet(scheduler.add_noise(clean, noise, steps), steps).sample
    target = scheduler.get_velocity(clean, noise, steps)
    snr = compute_snr(scheduler, steps)
    return ((velocity.float() - target).square().mean((1, 2, 3)) * snr.clamp(max=GAMMA) / (snr + 1)).mean()


@torch.no_grad()
def sample(unet: nn.Module, scheduler: DDIMScheduler, count: int = 36, steps: int = 30) -> Tensor:
    """(count, C, h, w) from fixed seeds."""
    shape = (count, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            velocity = unet(x, t).sample
        x = scheduler.step(velocity.float(), t, x).prev_sample
    return x


def train(pictures: Pictures, folder: Path, total: int) -> UNet2DModel:
    """Train to `total` steps and return the averaged network."""
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    unet, scheduler = UNet2DModel(**pictures.unet), DDIMScheduler(**pictures.noise)
    average = EMAModel(unet.parameters(), decay=AVERAGE, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(unet.parameters(), RATE, weight_decay=0.01, betas=(0.9, 0.99))
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=WARMUP)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - WARMUP, eta_min=RATE / 50)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, fall], [WARMUP])
    last, state = work / "last.pt", {"step": 0, "seconds": 0.0}
    parts = {"unet": unet, "average": average, "optimizer": optimizer, "schedule": schedule}
    if last.is_file():
        state = torch.load(last, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    start, running = time.process_time() - state["seconds"], []
    bar = tqdm(range(state["step"], total), "steps", initial=state["step"], total=total)
    for step in bar:
        draw = torch.Generator().manual_seed(step)
        rows = torch.randint(0, pictures.views.shape[1], (BATCH,), generator=draw)
        mirrored = (torch.rand(BATCH, generator=draw) < 0.5).long()
        loss = loss_of(unet, scheduler, pictures.views[mirrored, rows], draw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.step(unet.parameters())
        running.append(loss.item())
        bar.set_postfix(loss=f"{sum(running[-100:]) / len(running[-100:]):.4f}")
        if (step + 1) % EVERY == 0 or step + 1 == total:
            average.store(unet.parameters())
            average.copy_to(unet.parameters())
            with torch.no_grad():
                held_out = loss_of(unet, scheduler, pictures.held_out, torch.Generator().manual_seed(1))
            save_image(make_grid(pictures.shown(sample(unet, scheduler)), nrow=9), work / f"samples_{step + 1:06d}.png")
            average.restore(unet.parameters())
            seconds = time.process_time() - start
            with (work / "log.csv").open("a") as stream:
                stream.write(f"{step + 1},{sum(running) / len(running):.5f},{held_out.item():.5f},{seconds:.0f}\n")
            running = []
            state = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1, "seconds": seconds}
            torch.save(state, last.with_suffix(".partial"))
            last.with_suffix(".partial").replace(last)
    average.copy_to(unet.parameters())
    return unet.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="gen_faces/split.csv", help="CSV with path, split and (not necessarily) domain")
    parser.add_argument("--domain", default="source", help="rows that count, where the CSV has domains")
    parser.add_argument("--autoencoder", type=Path, help="folder of TAEF2's weights: the network learns its latents of 128 x 128 pixels")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints/offline_ddpm"))
    parser.add_argument("--steps", type=int, default=5000, help="of 8 pictures")
    given = parser.parse_args()
    images = read(given.images, given.domain, PIXELS["sample_size"] if given.autoencoder is None else SCALE * LATENTS["sample_size"])
    if given.autoencoder is None:
        pictures = Pictures(torch.stack([images["train"], images["train"].flip(3)]), images["val"])
    else:
        pictures = encoded(images, load_tiny_autoencoder(given.autoencoder), given.folder / "work" / "latents.safetensors")
    unet = train(pictures, given.folder, given.steps)
    facts = {"images": given.images, "pictures": pictures.views.shape[1], "steps": given.steps, "batch": BATCH}
    parts = {"unet", "scheduler", "model_index.json", "training.json", STATISTICS}
    with staged_folder(given.folder / "pipeline", frozenset(parts), "a generator") as staging:
        DDIMPipeline(unet, DDIMScheduler(**pictures.noise)).save_pretrained(staging)
        (staging / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        if pictures.autoencoder is not None:
            told = {"mean": pictures.autoencoder.mean.flatten().tolist(), "std": pictures.autoencoder.std.flatten().tolist()}
            (staging / STATISTICS).write_text(json.dumps(told) + "\n")
    print(f"generator: {given.folder / 'pipeline'} ({sum(each.numel() for each in unet.parameters()):,} parameters)")


if __name__ == "__main__":
    main()
