"""How a diffusion model mixes pictures with noise, and what its output says of both, for every kind of prediction.

    x_t = a_t x + s_t eps,      epsilon: eps      v_prediction: v = a_t eps - s_t x      sample: x      flow: eps - x

With abar_t of a DDPM-like scheduler a_t = sqrt(abar_t), s_t = sqrt(1 - abar_t); with a flow's sigma_t a_t = 1 - sigma_t, s_t = sigma_t.
Sources: Ho et al., DDPM, 2020; Salimans and Ho (v), 2022; Hang et al., min-SNR weighting, ICCV 2023; Song et al., DDIM, 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vision_peft.errors import UserError

KINDS = ("epsilon", "v_prediction", "sample", "flow")


class NoiseSchedule:
    """Of a diffusers scheduler; times t are whole numbers (B,), 0 to `steps` - 1, the higher the noisier.

    Raises:
        UserError: a scheduler that tells neither alphas nor a flow's sigmas.
    """

    def __init__(self, scheduler: Any) -> None:
        self.steps = int(scheduler.config.get("num_train_timesteps", 0))
        if hasattr(scheduler, "alphas_cumprod"):
            self.kind = scheduler.config.prediction_type
            self.signal, self.noise = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
            self.times = torch.arange(self.steps)
        elif type(scheduler).__name__.startswith("FlowMatch"):
            self.kind = "flow"
            fresh = type(scheduler).from_config(scheduler.config)  # its sigmas before set_timesteps() thins them out
            self.noise = fresh.sigmas[: self.steps].flip(0).float().cpu()
            self.signal, self.times = 1 - self.noise, self.noise * self.steps
        else:
            raise UserError(f"scheduler {type(scheduler).__name__}: tells no noise levels; choose a DDPM-like or a flow's one")
        if self.kind not in KINDS:
            raise UserError(f"scheduler {type(scheduler).__name__}: unknown prediction_type {self.kind!r}")

    def for_network(self, t: Tensor) -> Tensor:
        """What the network is told of the times (B,)."""
        return self.times.to(t.device)[t]

    def mix(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, of the shape of `clean` (B, C, H, W)."""
        a, s = self._levels(t, clean)
        return a * clean + s * noise

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say."""
        a, s = self._levels(t, clean)
        return {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean, "flow": noise - clean}[self.kind]

    def clean(self, output: Tensor, mixed: Tensor, t: Tensor) -> Tensor:
        """The clean picture that an output claims: x from x_t, in one step."""
        a, s = self._levels(t, mixed)
        if self.kind == "epsilon":
            return (mixed - s * output) / a.clamp(min=1e-4)
        return {"v_prediction": a * mixed - s * output, "sample": output, "flow": mixed - s * output}[self.kind]

    def step(self, clean: Tensor, mixed: Tensor, t: Tensor, earlier: Tensor | None) -> Tensor:
        """DDIM's deterministic step from t to `earlier` (B,), `clean` being taken for true; None: to the end."""
        if earlier is None:
            return clean
        a, s = self._levels(t, mixed)
        return self.mix(clean, (mixed - a * clean) / s.clamp(min=1e-4), earlier)

    def min_snr(self, t: Tensor, gamma: float) -> Tensor:
        """Weights (B,) of the squared error: min(SNR, gamma) times what turns an error of the output into one of x."""
        if self.kind == "flow":
            raise UserError("model.snr_gamma: is defined for epsilon, v_prediction and sample, not for a flow; set it to null")
        snr = (self.signal.to(t.device)[t] / self.noise.to(t.device)[t].clamp(min=1e-8)) ** 2
        capped = snr.clamp(max=gamma)
        return {"epsilon": capped / snr.clamp(min=1e-8), "v_prediction": capped / (snr + 1), "sample": capped}[self.kind]

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t (B, 1, 1, 1) in float32."""
        shape = (-1, *[1] * (like.ndim - 1))
        return self.signal.to(like.device)[t].reshape(shape), self.noise.to(like.device)[t].reshape(shape)
