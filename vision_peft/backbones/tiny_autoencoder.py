"""A tiny image autoencoder around a denoiser of its latents: TAEF2, 2.7 million parameters, 32 channels at an eighth of the side.

    encoder   conv 3 -> 64, block, three times (conv of stride 2, three blocks), conv 64 -> 32
    decoder   z -> 3 tanh(z / 3), conv 32 -> 64, three times (three blocks, nearest x 2, conv), block, conv 64 -> 3
    block     x -> relu(x + conv3(relu(conv2(relu(conv1(x)))))), all 3 x 3 of 64 channels; the three blocks next to the latents take
              x + mix(x) for x, mix: 1 x 1 to 256 channels, group norm, relu, 1 x 1 back

Weights: madebyollin/taesd (MIT), distilled from the autoencoder of FLUX.2; encoder.safetensors and decoder.safetensors hold its state
dicts. diffusers' AutoencoderTiny has no mixing branch and cannot hold them.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vision_peft.errors import UserError

WIDTH, LATENTS, SCALE = 64, 32, 8
STATISTICS = "latents.json"


class Block(nn.Module):
    def __init__(self, mixing: bool = False) -> None:
        super().__init__()
        layers = [nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        if mixing:
            wide = 4 * WIDTH
            ends = nn.Conv2d(WIDTH, wide, 1, bias=False), nn.Conv2d(wide, WIDTH, 1, bias=False)
            self.pool = nn.Sequential(ends[0], nn.GroupNorm(4, wide), nn.ReLU(), ends[1])

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class Bound(nn.Module):
    """Latents within (-3, 3)."""

    def forward(self, z: Tensor) -> Tensor:
        return 3 * torch.tanh(z / 3)


class TinyAutoencoder(nn.Module):
    """Called as diffusers' autoencoders are.

    Args:
        mean, std: of each of the 32 channels over the pictures that the denoiser was trained on; it works on (z - mean) / std.
    """

    def __init__(self, mean: list[float] | None = None, std: list[float] | None = None) -> None:
        super().__init__()
        down: list[nn.Module] = [nn.Conv2d(3, WIDTH, 3, padding=1), Block()]
        up: list[nn.Module] = [Bound(), nn.Conv2d(LATENTS, WIDTH, 3, padding=1), nn.ReLU()]
        for level in range(3):
            down += [nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False), *(Block(mixing=level == 2) for _ in range(3))]
            up += [*(Block(mixing=level == 0) for _ in range(3)), nn.Upsample(scale_factor=2)]
            up += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(WIDTH, LATENTS, 3, padding=1))
        self.decoder = nn.Sequential(*up, Block(), nn.Conv2d(WIDTH, 3, 3, padding=1))
        self.register_buffer("mean", torch.tensor(mean or [0.0] * LATENTS)[:, None, None])
        self.register_buffer("std", torch.tensor(std or [1.0] * LATENTS)[:, None, None])

    @property
    def config(self) -> SimpleNamespace:
        return SimpleNamespace(latent_channels=LATENTS, shift_factor=self.mean, scaling_factor=1 / self.std)

    def encode(self, images: Tensor) -> SimpleNamespace:
        """`latents` (B, 32, H / 8, W / 8) of pictures (B, 3, H, W) in [-1, 1]; always the same ones."""
        return SimpleNamespace(latents=self.encoder(images / 2 + 0.5))

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Pictures (B, 3, H, W), about in [-1, 1]."""
        return (self.decoder(z) * 2 - 1,)


def load_tiny_autoencoder(folder: str | Path, statistics: Path | None = None) -> TinyAutoencoder:
    """Of a folder with encoder.safetensors and decoder.safetensors, in float32.

    Args:
        statistics: a JSON file with `mean` and `std` of the latents; None or not there: 0 and 1.

    Raises:
        UserError: a file is missing or is something else.
    """
    told = _statistics(statistics) if statistics is not None and statistics.is_file() else {}
    found = TinyAutoencoder(**told)
    for part in ("encoder", "decoder"):
        path = Path(folder) / f"{part}.safetensors"
        if not path.is_file():
            raise UserError(f"backbone.autoencoder {folder}: holds no {part}.safetensors")
        try:
            tensors = {key: tensor.float() for key, tensor in load_file(path).items()}
            getattr(found, part).load_state_dict(tensors)
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{path}: is no {part} of TAEF2 ({' '.join(str(error).split())[:200]})") from error
    return found.eval().requires_grad_(False)


def _statistics(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        wanted = {key: [float(each) for each in found[key]] for key in ("mean", "std")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: should hold `mean` and `std`, {LATENTS} numbers each ({error!r})") from error
    if {len(each) for each in wanted.values()} != {LATENTS} or min(wanted["std"]) <= 0:
        raise UserError(f"{path}: should hold `mean` and `std`, {LATENTS} numbers each, the latter positive")
    return wanted
