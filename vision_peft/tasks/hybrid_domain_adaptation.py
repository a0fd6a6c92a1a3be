"""Few-shot hybrid domain adaptation: one generator whose pictures carry what several domains have, from a few pictures of each.

Source and adapted generator are one network, adapters off and on. A clean picture x of the source's own is mixed with noise to x_t; both
say which clean picture they see in x_t (`one_step`), or walk from there to a clean picture by a few deterministic steps (`trajectory`).
The two pictures, embedded by frozen encoders, give the loss (see directional_subspace). No discriminator, and no picture of the hybrid.

Source: Few-shot Hybrid Domain Adaptation of Image Generators, ICLR 2024 (abstract; no code was released); on diffusion models as in Kim et
al., DiffusionCLIP, CVPR 2022. `whiten`, `ways: mean` and `veil` are this project's.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from vision_peft.backbones.base import Backbone
from vision_peft.backbones.diffusion import Condition, Diffusion
from vision_peft.data.target_domains import describe_domains
from vision_peft.engine.fingerprint import fingerprint
from vision_peft.errors import UserError
from vision_peft.generation.evaluation import Domain
from vision_peft.generation.picture_encoder import PictureEncoder
from vision_peft.generation.sampling import draw_noise, sample_prompts
from vision_peft.linalg.subspace import Subspace
from vision_peft.linalg.whitening import Whitening
from vision_peft.tasks.directional_subspace import Mode, direction_loss, distance_loss, perpendiculars
from vision_peft.tasks.frozen_encodings import FrozenEncodings
from vision_peft.tasks.generator import GeneratorTask
from vision_peft.user_cache import cache_folder, kept_tensors

SOURCE_SEED, VEIL_SEED = 1, 3
OWN_BATCH = 32  # of the generator's own pictures


class HybridDomainAdaptation(GeneratorTask):
    """Trains on TargetDomains; a single domain is the special case.

    Logs, by domain and encoder: train/distance, train/cosine (of the change to the shortest way there). Validation and test generate
    pictures from seeds of their own and measure them against held-out ones with the judge (see generation.evaluation).

    Args:
        encoders: whose embeddings the loss is of; losses add up. Of pictures that are aligned, such as faces, those of every place side by
            side (a Vit with `pool: none`) tell a small part such as a mouth much better than their mean.
        judge: encoder of the measures; null: the first of `encoders`, which was trained on and flatters.
        distance, direction: weights of the two terms.
        subspace: hull of the references: `affine`, or the `linear` span, which holds the origin.
        energy: share of the references' variance that the hull spans.
        power: of the distance, 2 or 1.
        direction_mode, tau: see direction_loss().
        ways: the shortest way to a domain begins at each `picture`'s embedding, or at the `mean` of the generator's own: what tells one
            picture from another is then no part of the direction, nor of the distance.
        whiten: shrinkage of a map under which embeddings of the generator's own pictures vary alike in all directions (see
            linalg.whitening): a domain is then what these do not vary in, rather than light, pose and person; null: embeddings as they are.
        picture: weight of |x_T - x_S|, mean absolute difference of the two pictures in [-1, 1] (DiffusionCLIP's term); 0: off.
        mode: see above; `trajectory` costs `trajectory_steps` times the memory and time.
        times: shares of the noise schedule between which t is drawn: above, one step gives an average picture; below, only texture can
            change. Pictures are sampled without adapters above and below, where they were not trained.
        veil: references are embedded as the frozen generator sees them under noise at the times of training, so many times each: pictures
            estimated in one step are smooth, and against sharp references "sharper" would be a part of every direction; 0: as they are.
        measured: pictures that are generated for validation and test.
        guidance: of the generator's own pictures and of samples; training itself has none.
        others: see GeneratorTask.
    """

    def __init__(
        self,
        backbone: Diffusion,
        encoders: list[Backbone],
        judge: Backbone | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4),
        schedule: Literal["cosine", "constant"] = "constant",
        min_lr: float = 1e-6,
        warmup_steps: int = 0,
        distance: float = 1.0,
        direction: float = 1.0,
        subspace: Literal["affine", "linear"] = "affine",
        energy: float = 1.0,
        power: Literal[1, 2] = 2,
        direction_mode: Mode = "per_domain",
        tau: float = 0.05,
        ways: Literal["picture", "mean"] = "picture",
        whiten: float | None = None,
        picture: float = 0.0,
        mode: Literal["one_step", "trajectory"] = "one_step",
        trajectory_steps: int = 6,
        times: tuple[float, float] = (0.1, 0.5),
        veil: int = 2,
        average: float | None = None,
        measured: int = 32,
        samples: int = 8,
        sample_steps: int = 30,
        guidance: float = 1.0,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, min_lr, warmup_steps, average, samples, None, sample_steps, guidance)
        if not encoders:
            raise UserError("model.encoders: is empty; name at least one, e.g. a Vit offline:effnet_lite0")
        if not 0 <= times[0] < times[1] <= 1:
            raise UserError(f"model.times: must be two rising shares between 0 and 1, not {times}")
        if whiten is not None and whiten <= 0:
            raise UserError(f"model.whiten: must be positive (1 is a good start) or null, not {whiten}")
        given = [*encoders, *([judge] if judge is not None else [])]
        object.__setattr__(self, "_given", given)  # read in build(): children would be part of checkpoints' strict comparison
        self.has_judge = judge is not None
        self.weights_of_terms = (distance, direction)
        self.subspace, self.energy, self.power, self.direction_mode, self.tau = subspace, energy, power, direction_mode, tau
        self.picture, self.mode, self.trajectory_steps, self.times = picture, mode, trajectory_steps, times
        self.ways, self.whiten = ways, whiten
        self.maps: list[Whitening | None] = []
        self.starts: list[Tensor | None] = []
        self.veil, self.measured, self.acts = veil, measured, times
        self.spaces: list[dict[str, Subspace]] = []
        self.weights: dict[str, float] = {}
        self.bank: Tensor | None = None
        self.encodings = FrozenEncodings(backbone, "memory")
        self._facts: dict[str, Any] = {}

    def build(self, data: pl.LightningDataModule) -> None:
        if data is None:
            return
        if not hasattr(data, "references"):
            raise UserError(f"data: {type(data).__name__} holds no domains; this task needs TargetDomains")
        data.preprocess = self.backbone.preprocess
        for backbone in self._given:
            backbone.load()
        self.encoders = nn.ModuleList(PictureEncoder(backbone) for backbone in self._given).requires_grad_(False)
        self.train(self.training)  # now that the generator is loaded
        self.weights = data.weights
        self._facts = {"domains": describe_domains(data), "encoders": [each.describe() for each in self._given]}

    def train(self, mode: bool = True) -> HybridDomainAdaptation:
        """Set the mode of all but the generator: dropout of its own (DiT's, of labels) would tell the two pictures of a pair apart."""
        super().train(mode)
        self.backbone.eval()
        return self

    def prepare(self, trainer: pl.Trainer) -> None:
        super().prepare(trainer)
        if trainer.datamodule is not None:
            trainer.datamodule.preprocess = self.backbone.preprocess

    def _know(self) -> None:
        """Hulls and own pictures, when they are first needed: on the device of the run."""
        if self.bank is not None:
            return
        data = self.trainer.datamodule
        with self.frozen(), torch.no_grad():
            references = {name: self._veiled(data.references(name)) if self.veil else data.references(name) for name in data.weights}
            self.bank = self._own_pictures(self.prompts_shown(data, data.sources))
            own = [self.backbone.decode(part.to(self.device)).float().cpu() for part in self.bank.split(OWN_BATCH)]
        for index in range(len(self.encoders) - self.has_judge):
            embedded = self.encoders[index].many(torch.cat(own))
            self.maps.append(Whitening.of(embedded, self.whiten) if self.whiten is not None else None)
            self.starts.append(self._mapped(index, embedded).mean(0) if self.ways == "mean" else None)
            found = {name: self._mapped(index, self.encoders[index].many(images)) for name, images in references.items()}
            self.spaces.append({name: self._hull(name, embeddings) for name, embeddings in found.items()})

    def _mapped(self, index: int, embeddings: Tensor) -> Tensor:
        return embeddings if self.maps[index] is None else self.maps[index](embeddings)

    def _veiled(self, images: Tensor) -> Tensor:
        """What the frozen generator sees in the pictures (n, 3, S, S) under noise at the times of training, `veil` times each."""
        batches = images.repeat(self.veil, 1, 1, 1).split(16)
        found = []
        for index, batch in enumerate(batches):
            clean = self.backbone.encode(batch.to(self.device))
            draws = [torch.Generator().manual_seed(VEIL_SEED * 10_007 + 16 * index + place) for place in range(len(batch))]
            x, t = self._noised(clean.float().cpu(), draws)
            condition = self.encodings.condition(self.prompts_shown(self.trainer.datamodule, len(batch)))
            found.append(self.backbone.decode(self._walk(x, t, condition)).float().cpu())
        return torch.cat(found)

    def _hull(self, name: str, embeddings: Tensor) -> Subspace:
        try:
            return Subspace.of(embeddings, self.subspace, self.energy)
        except ValueError as error:
            raise UserError(f"data.domains: {name}: {error}") from error

    def _own_pictures(self, prompts: list[str]) -> Tensor:
        """Clean x (a prompt each, C, h, w) of the frozen generator, kept by what it is and how they were drawn."""
        marks = f"{fingerprint(self.backbone.network)}/{self.encodings.marks(self.encodings.text_encoders)}"
        facts = f"{marks}/{self.backbone.scheduler.config}/{self.sample_steps}/{self.guidance}/{prompts}/{SOURCE_SEED}"
        path = cache_folder("generated") / f"{hashlib.sha256(facts.encode()).hexdigest()[:24]}.safetensors"

        def draw() -> dict[str, Tensor]:
            rank_zero_info(f"{len(prompts)} pictures of the generator's own are drawn and kept in {path}")
            noise = draw_noise(self.backbone, len(prompts), SOURCE_SEED)
            return {"x": sample_prompts(self.backbone, noise, prompts, self.sample_steps, self.guidance, batch=OWN_BATCH)}

        return kept_tensors(path, draw)["x"]

    def facts(self) -> dict[str, Any]:
        return {"task": "hybrid_domain_adaptation", "acts": list(self.acts), **self._facts}

    # ---- the loss ----

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        self._know()
        x, t = self._mixed(batch)
        prompts = self.prompts_shown(self.trainer.datamodule, len(self.bank))
        condition = self.encodings.condition([prompts[index] for index in batch["source"].tolist()])
        with self.frozen(), torch.no_grad():
            source = self.backbone.decode(self._walk(x, t, condition)).float()
        adapted = self.backbone.decode(self._walk(x, t, condition)).float()
        total = self.picture * (adapted - source).abs().mean()
        for index, spaces in enumerate(self.spaces):
            encoder = self.encoders[index]
            with torch.no_grad():
                f_source = self._mapped(index, encoder(source))
            f_adapted = self._mapped(index, encoder(adapted))
            near = distance_loss(f_adapted, spaces, self.weights, self.power, self.starts[index])
            straight = direction_loss(f_source, f_adapted, spaces, self.weights, self.direction_mode, self.tau, self.starts[index])
            total = total + self.weights_of_terms[0] * near + self.weights_of_terms[1] * straight
            self._log_way(index, f_source, f_adapted.detach(), spaces)
        return total

    def _mixed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """x_t (B, C, h, w) and t (B,), of the batch's own seeds."""
        return self._noised(self.bank[batch["source"].cpu()], [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]])

    def _noised(self, clean: Tensor, draws: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """x_t and t of clean x (B, C, h, w), a generator each."""
        low, high = (round(share * (self.backbone.noise.steps - 1)) for share in self.times)
        t = torch.cat([torch.randint(low, high + 1, (1,), generator=draw) for draw in draws])
        noise = torch.stack([torch.randn(clean.shape[1:], generator=draw) for draw in draws])
        return self.backbone.noise.mix(clean, noise, t).to(self.device), t.to(self.device)

    def _walk(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The clean x that the network comes to from x_t."""
        if self.mode == "one_step":
            return self.backbone.clean(x, t, condition)
        shares = torch.linspace(1, 0, self.trajectory_steps + 1, device=t.device)[:-1]
        grid = [(t * share).round().long() for share in shares]
        for now, later in zip(grid, [*grid[1:], None]):
            clean = self.backbone.clean(x, now, condition)
            x = self.backbone.noise.step(clean, x, now, later)
        return x

    def _log_way(self, index: int, source: Tensor, adapted: Tensor, spaces: dict[str, Subspace]) -> None:
        if not self.trainer.training:  # a calibration pass of a method logs nothing
            return
        change = torch.nn.functional.normalize(adapted - source, dim=1)
        start = source if self.starts[index] is None else self.starts[index].to(source).expand_as(source)
        for name, way in perpendiculars(start, spaces).items():
            where = name if len(self.spaces) == 1 else f"{name}/{index}"
            self.log(f"train/distance/{where}", spaces[name].distance(adapted, 1).mean())
            self.log(f"train/cosine/{where}", (change * way).sum(1).mean())

    # ---- measures ----

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._measure("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._measure("test")

    def _measure(self, stage: str) -> None:
        data = self.trainer.datamodule
        domains = {name: Domain(data.shots(name), data.held_out(name)) for name in data.weights}
        found = self.measure(self.encoders[-1 if self.has_judge else 0], domains, self.measured, data.held_out(None))
        for name, value in found.items():
            self.log(f"{stage}/{name}", value, batch_size=1)
