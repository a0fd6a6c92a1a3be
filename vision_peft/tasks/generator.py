"""What tasks that adapt a generator share: the average of what is trained, pictures from fixed seeds as training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from vision_peft.backbones.diffusion import Diffusion
from vision_peft.errors import UserError
from vision_peft.generation.acts import ALWAYS
from vision_peft.generation.evaluation import Domain, compare_pictures
from vision_peft.generation.picture_encoder import PictureEncoder
from vision_peft.generation.sampling import draw_noise, pictures
from vision_peft.report.picture_grid import save_grid
from vision_peft.tasks.base import Task
from vision_peft.tasks.weight_average import WeightAverage

SHOWN_SEED, MEASURED_SEED = 0, 2


class GeneratorTask(Task):
    """Base of tasks on a Diffusion backbone.

    With an average, validation, pictures and the exported adapter are of the averaged numbers; checkpoints hold both.

    Args:
        backbone: see Diffusion.
        average: decay of the exponential moving average of what is trained; null: none.
        samples: pictures of a grid, from seeds 0, 1, ...: the upper row by the frozen model, the lower one by the adapted; 0: no grids.
        sample_prompts: shown in turn; null: the prompts that are trained on.
        sample_steps, guidance: of sampling.
    """

    acts = ALWAYS  # see generation.acts

    def __init__(
        self,
        backbone: Diffusion,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        schedule: Literal["cosine", "constant"] = "constant",
        min_lr: float = 1e-6,
        warmup_steps: int = 0,
        average: float | None = None,
        samples: int = 8,
        sample_prompts: list[str] | None = None,
        sample_steps: int = 30,
        guidance: float = 1.0,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, min_lr, warmup_steps)
        if not isinstance(backbone, Diffusion):
            raise UserError(f"model.backbone: {type(backbone).__name__} generates nothing; this task needs a Diffusion")
        if average is not None and not 0 < average < 1:
            raise UserError(f"model.average: must be between 0 and 1, not {average}")
        if guidance != 1 and not (backbone.is_conditional or backbone.classes):
            raise UserError(f"model.guidance: is for models that take prompts, and {backbone.name} takes none; set it to 1")
        self.average_decay, self.samples, self.sample_prompts = average, samples, sample_prompts
        self.sample_steps, self.guidance = sample_steps, guidance
        self._averaged = False
        self._frozen_row: Tensor | None = None
        self._frozen_measured: Tensor | None = None

    # ---- the average ----

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.average_decay is not None and "average" not in self.parts:  # now: the adapters are in place
            self.add_part("average", WeightAverage(self, self.average_decay), scaffold=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if "average" in self.parts:
            self.average.update(self)

    def _show_average(self, wanted: bool) -> None:
        if "average" in self.parts and self._averaged != wanted:
            self.average.swap(self)
            self._averaged = wanted

    # These hooks come before adapters are merged for an evaluation, and after they are taken out again.

    def on_validation_model_eval(self) -> None:
        self._show_average(True)
        super().on_validation_model_eval()

    def on_validation_model_train(self) -> None:
        self._show_average(False)
        super().on_validation_model_train()

    on_test_model_eval = on_validation_model_eval

    def on_train_end(self) -> None:
        """After the last checkpoint is written, before the adapter is."""
        self._show_average(True)

    # ---- measures ----

    def measure(self, encoder: PictureEncoder, domains: Mapping[str, Domain], count: int, hybrid: Tensor | None = None) -> dict[str, float]:
        """See compare_pictures(): `count` pictures from seeds that grids and training do not use."""
        prompts = self.prompts_shown(self.trainer.datamodule, count)
        noise = draw_noise(self.backbone, count, MEASURED_SEED)
        if self._frozen_measured is None:
            with self.frozen():
                self._frozen_measured = self.generate(noise, prompts)
        return compare_pictures(encoder, self._frozen_measured, self.generate(noise, prompts), domains, hybrid)

    # ---- pictures ----

    def prompts_shown(self, data: pl.LightningDataModule, count: int) -> list[str]:
        wanted = self.sample_prompts or getattr(data, "prompts", None) or [""]
        return [wanted[index % len(wanted)] for index in range(count)]

    def generate(self, noise: Tensor, prompts: list[str]) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], clipped, by the network as it is now."""
        return pictures(self.backbone, noise, prompts, self.sample_steps, self.guidance, acts=self.acts)

    def on_validation_epoch_end(self) -> None:
        if self.samples and not self.trainer.sanity_checking and self.trainer.is_global_zero:
            self.show(f"step_{self.global_step:06d}")

    def on_fit_end(self) -> None:
        if self.samples and not self.trainer.fast_dev_run and self.trainer.is_global_zero:
            self.eval()
            with self.trainer.precision_plugin.forward_context():
                self.show("last")

    @rank_zero_only
    def show(self, name: str) -> None:
        """Write RUN/samples/NAME.png."""
        prompts = self.prompts_shown(self.trainer.datamodule, self.samples)
        noise = draw_noise(self.backbone, self.samples, SHOWN_SEED)
        if self._frozen_row is None:
            with self.frozen():
                self._frozen_row = self.generate(noise, prompts)
        path = Path(self.trainer.default_root_dir) / "samples" / f"{name}.png"
        save_grid({"frozen": self._frozen_row, "adapted": self.generate(noise, prompts)}, path)
        rank_zero_info(f"pictures: {path}")
