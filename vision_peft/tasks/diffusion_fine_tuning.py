"""Fine-tuning of a diffusion model on pictures: the network learns to say of x_t what its schedule asks for.

    L = E_{x, eps, t} w(t) |net(x_t, t, c) - target(x, eps, t)|^2   (+ prior_weight times the same of pictures of the class)

w(t) is 1 or min-SNR's. Sources: Ho et al. 2020; Hang et al., "Efficient Diffusion Training via Min-SNR Weighting", ICCV 2023; Ruiz et al.,
"DreamBooth", CVPR 2023 (prior preservation).
"""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from vision_peft.backbones.base import Backbone
from vision_peft.backbones.diffusion import Diffusion
from vision_peft.errors import UserError
from vision_peft.generation.evaluation import Domain
from vision_peft.generation.picture_encoder import PictureEncoder
from vision_peft.tasks.frozen_encodings import FrozenEncodings
from vision_peft.tasks.generator import GeneratorTask

VALIDATION_SEED = 12345


class DiffusionFineTuning(GeneratorTask):
    """Trains on GeneratorImages. Logs train/loss, and val/loss of held-out pictures under fixed noise and times; a test also measures
    pictures that it generates (see generation.evaluation), where there is a judge.

    Args:
        judge: encoder of the measures; null: the loss alone is tested.
        measured: pictures that are generated for them.
        snr_gamma: of min-SNR weighting; null: all times weigh the same.
        prior_weight: of the pictures of the class, where data gives them.
        cache: what the frozen autoencoder says of pictures is computed once (exactly: of a variational one the posterior is kept), and
            what text encoders say of prompts; `disk` keeps both for later runs, `off` encodes pictures anew at every step.
        others: see GeneratorTask.
    """

    def __init__(
        self,
        backbone: Diffusion,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        schedule: Literal["cosine", "constant"] = "constant",
        min_lr: float = 1e-6,
        warmup_steps: int = 0,
        snr_gamma: float | None = 5.0,
        prior_weight: float = 1.0,
        cache: Literal["memory", "disk", "off"] = "memory",
        judge: Backbone | None = None,
        measured: int = 32,
        average: float | None = None,
        samples: int = 8,
        sample_prompts: list[str] | None = None,
        sample_steps: int = 30,
        guidance: float = 1.0,
    ) -> None:
        shown = (samples, sample_prompts, sample_steps, guidance)
        super().__init__(backbone, optimizer, schedule, min_lr, warmup_steps, average, *shown)
        if snr_gamma is not None:
            if snr_gamma <= 0:
                raise UserError(f"model.snr_gamma: must be positive, not {snr_gamma}")
            backbone.noise.min_snr(torch.zeros(1, dtype=torch.long), snr_gamma)  # says where it is not defined
        self.snr_gamma, self.prior_weight, self.measured = snr_gamma, prior_weight, measured
        object.__setattr__(self, "_judge", judge)  # read in build()
        self.cache = cache
        self.encodings = FrozenEncodings(backbone, "disk" if cache == "disk" else "memory")

    def build(self, data: pl.LightningDataModule) -> None:
        if data is None:
            return
        if not hasattr(data, "pictures"):
            raise UserError(f"data: {type(data).__name__} gives no pictures for a generator; this task needs GeneratorImages")
        data.preprocess = self.backbone.preprocess
        if self._judge is not None:
            self._judge.load()
            self.judge = PictureEncoder(self._judge).requires_grad_(False)

    def prepare(self, trainer: pl.Trainer) -> None:
        super().prepare(trainer)
        if trainer.datamodule is not None:
            # every time: a test may bring a data module of its own
            trainer.datamodule.preprocess = self.backbone.preprocess
            trainer.datamodule.encode = self.encodings.posteriors if self._is_encoded else None

    @property
    def _is_encoded(self) -> bool:
        """Whether batches hold posteriors instead of pictures."""
        return self.cache != "off" and self.backbone.has_autoencoder

    def loss(self, batch: dict[str, Any]) -> Tensor:
        loss = self._error(batch["image"], batch["prompt"])
        if "prior_image" in batch:
            loss = loss + self.prior_weight * self._error(batch["prior_image"], batch["prior_prompt"])
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        draw = torch.Generator().manual_seed(VALIDATION_SEED + batch_idx)
        self.log("val/loss", self._error(batch["image"], batch["prompt"], draw), prog_bar=True, batch_size=len(batch["image"]))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        draw = torch.Generator().manual_seed(VALIDATION_SEED + batch_idx)
        self.log("test/loss", self._error(batch["image"], batch["prompt"], draw), batch_size=len(batch["image"]))

    def on_test_epoch_end(self) -> None:
        if self._judge is None:
            return
        data = self.trainer.datamodule
        train, held_out = (data.images(part).float() / 127.5 - 1 for part in ("train", "val"))
        domain = Domain(train, held_out if len(held_out) else train)
        self.log_dict({f"test/{name}": value for name, value in self.measure(self.judge, {"domain": domain}, self.measured).items()})

    def _error(self, images: Tensor, prompts: list[str], draw: torch.Generator | None = None) -> Tensor:
        """Mean weighted squared error of pictures (B, 3, S, S) in [-1, 1], or of what the autoencoder says of them.

        Args:
            draw: of noise and times; None: the global stream, whose state checkpoints hold.
        """
        with torch.no_grad():
            drawn = self.backbone.draw if self._is_encoded else self.backbone.encode
            clean = drawn(images, draw or torch.default_generator).float()
        noise = torch.randn(clean.shape, generator=draw).to(clean)
        t = torch.randint(0, self.backbone.noise.steps, (len(clean),), generator=draw).to(clean.device)
        output = self.backbone(self.backbone.noise.mix(clean, noise, t), t, self.encodings.condition(prompts)).float()
        each = (output - self.backbone.noise.target(clean, noise, t)).square().flatten(1).mean(1)
        return (each if self.snr_gamma is None else each * self.backbone.noise.min_snr(t, self.snr_gamma)).mean()
