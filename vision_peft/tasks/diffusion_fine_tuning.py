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
from vision_peft.backbones.diffusion import Condition, Diffusion
from vision_peft.errors import UserError
from vision_peft.generation.evaluation import Domain
from vision_peft.generation.picture_encoder import PictureEncoder
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
        self._told: dict[str, Condition] = {}

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
            trainer.datamodule.preprocess = self.backbone.preprocess  # every time: a test may bring a data module of its own

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
        """Mean weighted squared error of pictures (B, 3, S, S) in [-1, 1].

        Args:
            draw: of noise and times; None: the global stream, whose state checkpoints hold.
        """
        with torch.no_grad():
            clean = self.backbone.encode(images, draw or torch.default_generator).float()
        noise = torch.randn(clean.shape, generator=draw).to(clean)
        t = torch.randint(0, self.backbone.noise.steps, (len(clean),), generator=draw).to(clean.device)
        output = self.backbone(self.backbone.noise.mix(clean, noise, t), t, self._condition(prompts)).float()
        each = (output - self.backbone.noise.target(clean, noise, t)).square().flatten(1).mean(1)
        return (each if self.snr_gamma is None else each * self.backbone.noise.min_snr(t, self.snr_gamma)).mean()

    def _condition(self, prompts: list[str]) -> Condition:
        """Each text is encoded once: text encoders are frozen."""
        if not (self.backbone.is_conditional or self.backbone.classes):
            return self.backbone.condition(prompts)
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._told:
                self._told[prompt] = self.backbone.condition([prompt])
        return _joined([self._told[prompt] for prompt in prompts])


def _joined(conditions: list[Condition]) -> Condition:
    """One of a batch from those of single prompts."""
    first = conditions[0]
    found: Condition = {}
    for key, value in first.items():
        each = [condition[key] for condition in conditions]
        found[key] = _joined(each) if isinstance(value, dict) else value if value is None else torch.cat(each)
    return found
