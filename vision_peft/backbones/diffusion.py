"""Diffusion models of diffusers as a backbone: a denoiser that is adapted, and around it, frozen, autoencoder, text encoders, scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from vision_peft.backbones.base import Backbone, Preprocess
from vision_peft.backbones.diffusion_attention import choose_attention
from vision_peft.backbones.diffusion_files import find_model
from vision_peft.backbones.diffusion_sites import name_denoiser_sites
from vision_peft.backbones.noise_schedule import NoiseSchedule
from vision_peft.backbones.offline import announce
from vision_peft.backbones.tiny_autoencoder import LATENTS, SCALE, STATISTICS, load_tiny_autoencoder
from vision_peft.engine.site import Site
from vision_peft.errors import UserError

ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
Condition = dict[str, Any]  # keyword arguments of the denoiser


class Diffusion(Backbone):
    """UNet2DModel, UNet2DConditionModel (Stable Diffusion 1, 2, XL), and transformers (DiT, PixArt, SD 3).

    `network` is the denoiser. Its inputs x are latents where there is an autoencoder, pictures in [-1, 1] otherwise.

    Args:
        name: a local folder in diffusers' layout (a pipeline's, or a denoiser's alone), one weights file, or a hub name.
        scheduler: class name in diffusers, with the model's own noise levels; null: the model's own.
        config: for one weights file: folder or hub name of a pipeline of its shape, from which all but the denoiser comes.
        pretrained: False starts from random weights of the shape that the files tell.
        autoencoder: folder with TAEF2's weights, for an unconditional denoiser of its latents (see tiny_autoencoder); null: the pipeline's.

    Raises:
        UserError: nothing of that name, or an unknown scheduler. No weights are read.
    """

    num_features = 0

    def __init__(
        self, name: str, *, scheduler: str | None = None, config: str | None = None, pretrained: bool = True, autoencoder: str | None = None
    ) -> None:
        super().__init__()
        self.name, self.scheduler_name, self.config, self.pretrained = name, scheduler, config, pretrained
        self.files = find_model(name, config, weights=pretrained)
        self.network = self.files.outline()
        self.scheduler = self.files.scheduler(scheduler)
        self.noise = NoiseSchedule(self.scheduler)
        self._sites = name_denoiser_sites(self.network)
        self._loaded = False
        shape = self.network.config
        self.channels = int(shape.in_channels)
        size = shape.sample_size
        self.sample_size = (size, size) if isinstance(size, int) else tuple(size)
        self.is_conditional = shape.get("cross_attention_dim") is not None or shape.get("joint_attention_dim") is not None
        self.classes = shape.get("num_embeds_ada_norm") if type(self.network).__name__ == "DiTTransformer2DModel" else None
        self.autoencoder = autoencoder
        if autoencoder is not None and self.channels != LATENTS:
            raise UserError(f"backbone.autoencoder: {name} works on {self.channels} channels, and latents of this one have {LATENTS}")
        size = self.sample_size[0] * (SCALE if autoencoder is not None else self.files.autoencoder_scale())
        self.preprocess = Preprocess(size, (0.5,) * 3, (0.5,) * 3)  # an input of [-1, 1]
        object.__setattr__(self, "_pipeline", None)  # holds the same modules: not a child of its own

    def load(self) -> None:
        if self._loaded:
            return
        if self.pretrained:
            network = self.files.load_denoiser(self.network)
        else:
            network = type(self.network).from_config(self.network.config)
            announce(f"backbone {self.name}: its denoiser starts from random weights")
        self.network = network.requires_grad_(False)
        choose_attention(self.network)
        if self.files.is_pipeline:
            object.__setattr__(self, "_pipeline", self.files.load_rest(self.network, self.scheduler))
            for part in ENCODERS:
                module = getattr(self._pipeline, part, None)
                if module is not None:
                    self.add_module(part, module.requires_grad_(False))
        if self.autoencoder is not None:
            self.add_module("vae", load_tiny_autoencoder(self.autoencoder, self.files.folder / STATISTICS))
        self._loaded = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Diffusion:
        """Set the denoiser's mode; what is around it stays in eval mode."""
        super().train(mode)
        for part in ENCODERS:
            if hasattr(self, part):
                getattr(self, part).eval()
        return self

    @property
    def has_autoencoder(self) -> bool:
        return hasattr(self, "vae")

    @property
    def pipeline(self) -> Any:
        """diffusers' own, around the same modules."""
        if self._pipeline is None:
            raise UserError(f"backbone {self.name}: a denoiser alone; this needs the folder of a pipeline ({'model_index.json'})")
        return self._pipeline

    def sites(self) -> list[Site]:
        return list(self._sites)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The denoiser's output, of the shape of x (B, C, h, w), at times t (B,), 0 to noise.steps - 1.

        Variances that some networks (DiT, PixArt) say beside the prediction are left out.
        """
        output = self.network(x, timestep=self.noise.for_network(t), return_dict=False, **(condition or {}))[0]
        return output[:, : x.shape[1]]

    def clean(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The clean x that the denoiser sees in x at t, in one step, in float32."""
        return self.noise.clean(self(x, t, condition).float(), x, t)

    def posterior(self, images: Tensor) -> Tensor:
        """What the autoencoder says of pictures (B, 3, H, W) in [-1, 1], for draw(): of a variational one mean and log-variance of latents.

        Pictures themselves where there is no autoencoder.
        """
        if not self.has_autoencoder:
            return images
        found = self.vae.encode(images)
        return found.latent_dist.parameters if hasattr(found, "latent_dist") else found.latents

    def draw(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x (B, C, h, w) from posterior(): with a `generator` a sample, else the mode."""
        if not self.has_autoencoder:
            return posterior
        latents = posterior
        if posterior.shape[1] == 2 * self.vae.config.latent_channels:
            gaussian = DiagonalGaussianDistribution(posterior)
            latents = gaussian.mode() if generator is None else gaussian.sample(generator)
        return (latents - self._shift) * self.vae.config.scaling_factor

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x of pictures (B, 3, H, W) in [-1, 1]."""
        return self.draw(self.posterior(images), generator)

    def decode(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], differentiable; not clipped."""
        if not self.has_autoencoder:
            return x
        return self.vae.decode(x / self.vae.config.scaling_factor + self._shift, return_dict=False)[0]

    @property
    def _shift(self) -> Tensor | float:
        told = getattr(self.vae.config, "shift_factor", None)
        return 0.0 if told is None else told

    @torch.no_grad()
    def condition(self, prompts: Sequence[str]) -> Condition:
        """What the denoiser is told of prompts (texts; numbers of classes for DiT); empty for an unconditional model.

        Raises:
            UserError: a prompt for a model that takes none, or a class that it does not have.
        """
        if self.classes is not None:
            numbers = [int(each) if each.isdigit() else -1 for each in prompts]
            if not all(0 <= each <= self.classes for each in numbers):
                raise UserError(f"backbone {self.name}: prompts are class numbers from 0 to {self.classes}, not {prompts[0]!r}")
            return {"class_labels": torch.tensor(numbers, device=self.device)}
        if not self.is_conditional:
            if any(prompts):
                raise UserError(f"backbone {self.name}: is unconditional and takes no prompt, given {next(filter(None, prompts))!r}")
            return {}
        return _text_condition(self.pipeline, list(prompts), self.device, self.preprocess.size)

    @property
    def no_prompt(self) -> str:
        """What guidance goes away from: an empty text, or DiT's class of no class."""
        return str(self.classes) if self.classes is not None else ""

    def save_pipeline(self, folder: str) -> None:
        """The whole pipeline in diffusers' layout, with the denoiser's parameters as they are now (merge() first)."""
        self.pipeline.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def example(self) -> tuple[Any, ...]:
        """Arguments of forward() for two fixed random inputs."""
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(2, self.channels, *self.sample_size, generator=draw)
        prompts = ["1", "2"] if self.classes is not None else ["a cat", "a dog"] if self.is_conditional else ["", ""]
        t = torch.tensor([self.noise.steps // 4, self.noise.steps // 2])
        return x, t, self.condition(prompts)

    def describe(self) -> dict[str, Any]:
        own = {"class": type(self).__name__, "name": self.name, "scheduler": self.scheduler_name, "config": self.config}
        return {**own, "pretrained": self.pretrained, "autoencoder": self.autoencoder, "denoiser": type(self.network).__name__}


def _text_condition(pipeline: Any, prompts: list[str], device: torch.device, size: int) -> Condition:
    """By the pipeline's own encode_prompt(), whose results differ by kind."""
    kind = type(pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer).__name__
    if kind == "UNet2DConditionModel" and hasattr(pipeline, "text_encoder_2"):
        hidden, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        times = torch.tensor([[size, size, 0, 0, size, size]], dtype=hidden.dtype, device=device).expand(len(prompts), -1)
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
    if kind == "UNet2DConditionModel":
        hidden, _ = pipeline.encode_prompt(prompts, device, 1, False)
        return {"encoder_hidden_states": hidden}
    if kind == "PixArtTransformer2DModel":
        hidden, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=device)
        found = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        if pipeline.transformer.use_additional_conditions:  # PixArt-alpha of 1024 pixels
            side, ratio = torch.full((len(prompts), 2), float(size), device=device), torch.ones(len(prompts), 1, device=device)
            found["added_cond_kwargs"] = {"resolution": side.to(hidden.dtype), "aspect_ratio": ratio.to(hidden.dtype)}
        return found
    if kind == "SD3Transformer2DModel":
        hidden, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, device=device)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}
    raise UserError(f"backbone: how {kind} is told of a text is not known here")
