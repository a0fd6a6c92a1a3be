"""Pictures from noise: the scheduler's own steps, with guidance where a model takes texts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from vision_peft.backbones.diffusion import Condition, Diffusion
from vision_peft.engine.install import frozen_weights
from vision_peft.generation.acts import ALWAYS, Acts


def draw_noise(backbone: Diffusion, count: int, seed: int) -> Tensor:
    """x_T (count, C, h, w): a seed gives the same pictures whatever the count, one after the other."""
    shape = (backbone.channels, *backbone.sample_size)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed * 100_003 + index)) for index in range(count)])


@torch.no_grad()
def sample(
    backbone: Diffusion,
    noise: Tensor,
    condition: Condition | None = None,
    steps: int = 30,
    guidance: float = 1.0,
    unconditional: Condition | None = None,
    seed: int = 0,
    acts: Acts = ALWAYS,
) -> Tensor:
    """Clean x (B, C, h, w) from noise (B, C, h, w), by the backbone's scheduler.

    Args:
        guidance: w of out_u + w (out_c - out_u); 1: without, and `unconditional` is not needed.
        seed: of what a stochastic scheduler draws.
        acts: shares of the noise schedule between which adapters act: elsewhere, where they were not trained, they would blur and tint.
    """
    scheduler = type(backbone.scheduler).from_config(backbone.scheduler.config)
    scheduler.set_timesteps(steps)
    stochastic = "generator" in inspect.signature(scheduler.step).parameters
    draw = {"generator": torch.Generator().manual_seed(seed)} if stochastic else {}
    x = noise.to(backbone.device) * getattr(scheduler, "init_noise_sigma", 1.0)  # a flow has none

    def walk(x: Tensor, times: Tensor) -> Tensor:
        for time in times:
            given = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
            told = time.expand(len(x)).to(x.device)
            output = _output(backbone, given, told, condition)
            if guidance != 1:
                free = _output(backbone, given, told, unconditional)
                output = free + guidance * (output - free)
            x = scheduler.step(output.float(), time, x, **draw).prev_sample
        return x

    times, (low, high) = scheduler.timesteps, (share * scheduler.config.num_train_timesteps for share in acts)
    for part, adapted in ((times > high, False), ((times <= high) & (times >= low), True), (times < low, False)):
        if part.any():
            with nullcontext() if adapted else frozen_weights(backbone.network):
                x = walk(x, times[part])
    return x


@torch.no_grad()
def sample_prompts(
    backbone: Diffusion, noise: Tensor, prompts: Sequence[str], steps: int = 30, guidance: float = 1.0, seed: int = 0,
    acts: Acts = ALWAYS, batch: int = 8,
) -> Tensor:  # fmt: skip
    """Clean x (B, C, h, w), on the processor, from noise (B, C, h, w) and a prompt each ("" for none); see sample()."""
    found = []
    for start in range(0, len(noise), batch):
        words = prompts[start : start + batch]
        condition = backbone.condition(words)
        free = backbone.condition([backbone.no_prompt] * len(words)) if guidance != 1 else None
        found.append(sample(backbone, noise[start : start + batch], condition, steps, guidance, free, seed, acts).cpu())
    return torch.cat(found)


@torch.no_grad()
def pictures(
    backbone: Diffusion, noise: Tensor, prompts: Sequence[str], steps: int = 30, guidance: float = 1.0, seed: int = 0,
    acts: Acts = ALWAYS, batch: int = 8,
) -> Tensor:  # fmt: skip
    """(B, 3, H, W) in [-1, 1], clipped, on the processor; see sample_prompts()."""
    x = sample_prompts(backbone, noise, prompts, steps, guidance, seed, acts, batch)
    return torch.cat([backbone.decode(part.to(backbone.device)).float().clamp(-1, 1).cpu() for part in x.split(batch)])


def _output(backbone: Diffusion, x: Tensor, told: Tensor, condition: Condition | None) -> Tensor:
    return backbone.network(x, timestep=told, return_dict=False, **(condition or {}))[0][:, : x.shape[1]]
