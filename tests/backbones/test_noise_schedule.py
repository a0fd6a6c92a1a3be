"""Mixing and unmixing of noise against diffusers' schedulers and against each other."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, KarrasVeScheduler
from diffusers.training_utils import compute_snr

from vision_peft.backbones.noise_schedule import NoiseSchedule
from vision_peft.errors import UserError

DRAW = torch.Generator().manual_seed(0)
CLEAN, NOISE = torch.randn(3, 2, 4, 4, generator=DRAW), torch.randn(3, 2, 4, 4, generator=DRAW)
T = torch.tensor([3, 400, 990])


def schedule(kind: str) -> NoiseSchedule:
    return NoiseSchedule(FlowMatchEulerDiscreteScheduler() if kind == "flow" else DDPMScheduler(prediction_type=kind))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_clean_picture_comes_back_from_a_perfect_output(kind):
    noise = schedule(kind)
    mixed = noise.mix(CLEAN, NOISE, T)
    torch.testing.assert_close(noise.clean(noise.target(CLEAN, NOISE, T), mixed, T), CLEAN, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_mixing_velocity_and_step_are_those_of_diffusers(kind):
    scheduler, noise = DDIMScheduler(prediction_type=kind, clip_sample=False), schedule(kind)
    torch.testing.assert_close(noise.mix(CLEAN, NOISE, T), scheduler.add_noise(CLEAN, NOISE, T))
    if kind == "v_prediction":
        torch.testing.assert_close(noise.target(CLEAN, NOISE, T), scheduler.get_velocity(CLEAN, NOISE, T))
    scheduler.set_timesteps(10)
    output, now = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)), scheduler.timesteps[4]
    expected = scheduler.step(output, now, CLEAN).prev_sample
    t, earlier = now.expand(3), scheduler.timesteps[5].expand(3)
    torch.testing.assert_close(noise.step(noise.clean(output, CLEAN, t), CLEAN, t, earlier), expected, rtol=1e-4, atol=1e-4)


def test_a_flow_is_a_straight_line_whose_times_the_scheduler_tells():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noise = NoiseSchedule(scheduler)
    told = noise.for_network(T)
    torch.testing.assert_close(noise.mix(CLEAN, NOISE, T), scheduler.scale_noise(CLEAN, told, NOISE), rtol=1e-4, atol=1e-4)
    assert (noise.noise.diff() > 0).all(), "noise rises with t"


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_the_clean_picture_alike(kind):
    """w(t) |output - target|^2 is min(SNR, gamma) |x_hat - x|^2 whatever the output is."""
    noise, scheduler = schedule(kind), DDPMScheduler()
    off = noise.target(CLEAN, NOISE, T) + 0.1
    mixed = noise.mix(CLEAN, NOISE, T)
    error = (off - noise.target(CLEAN, NOISE, T)).square().flatten(1).mean(1) * noise.min_snr(T, 5.0)
    clean = (noise.clean(off, mixed, T) - CLEAN).square().flatten(1).mean(1) * compute_snr(scheduler, T).clamp(max=5.0)
    torch.testing.assert_close(error, clean, rtol=1e-2, atol=1e-6)


def test_what_has_no_weights_or_no_levels_says_so():
    with pytest.raises(UserError, match="snr_gamma"):
        schedule("flow").min_snr(T, 5.0)
    with pytest.raises(UserError, match="tells no noise levels"):
        NoiseSchedule(KarrasVeScheduler())
    assert NoiseSchedule(EulerDiscreteScheduler()).kind == "epsilon"
