"""What a diffusers model is, told by its JSON files alone, and its weights when they are asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vision_peft.errors import UserError, nearest

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
DENOISERS = ("unet", "transformer")
SINGLE = (".safetensors", ".ckpt", ".bin", ".pt")
UNREAD = ["*.fp16*", "*.non_ema*", "safety_checker/*", "image_encoder/*"]  # of hub models: gigabytes that load() has no use for


@dataclass(frozen=True)
class ModelFiles:
    """A pipeline's folder, or one of a denoiser alone.

    Attributes:
        name: what the user gave.
        folder: with JSON files; of a hub model the local snapshot.
        part: the pipeline's name of its denoiser: unet or transformer; "" where the folder is a denoiser alone.
        single: one file with all weights, whose JSON files come from elsewhere.
    """

    name: str
    folder: Path
    part: str
    single: Path | None = None

    @property
    def is_pipeline(self) -> bool:
        return bool(self.part)

    @property
    def subfolder(self) -> str:
        """Of the denoiser: its part's, or "" where it lies beside the pipeline's index, as in older unconditional models."""
        return self.part if (self.folder / self.part / CONFIG).is_file() else ""

    def outline(self) -> nn.Module:
        """The denoiser on the meta device."""
        path = self.folder / self.subfolder / CONFIG
        config = _read(path)
        kind = _class(config.get("_class_name"), ModelMixin, path)
        with torch.device("meta"):
            return kind.from_config({key: value for key, value in config.items() if not key.startswith("_")})

    def scheduler(self, name: str | None) -> SchedulerMixin:
        """The model's own, or the one of that class with the model's settings.

        Raises:
            UserError: no scheduler of that name in diffusers, or none is told where the folder is a denoiser alone.
        """
        own = next((path for path in (self.folder / "scheduler" / SCHEDULER, self.folder / SCHEDULER) if path.is_file()), None)
        if own is None:
            if name is None:
                raise UserError(f"backbone {self.name}: holds no scheduler/; name one, e.g. scheduler: DDIMScheduler")
            return _scheduler_class(name)()
        config = _read(own)
        return _scheduler_class(name or config.get("_class_name")).from_config(config)

    def autoencoder_scale(self) -> int:
        """Pixels of a picture a pixel of its latents, on a side; 1 without an autoencoder."""
        path = self.folder / "vae" / CONFIG
        if not (self.is_pipeline and path.is_file()):
            return 1
        config = _read(path)
        return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)  # the latter of AutoencoderTiny

    def load_denoiser(self, outline: nn.Module) -> nn.Module:
        """With its weights, in float32.

        One file holds the denoiser in diffusers' own layout, or is a checkpoint in the layout of the model's authors.
        """
        kind = type(outline)
        if self.single is None:
            options = {"subfolder": self.subfolder} if self.subfolder else {}
            return _told(self.name, lambda: kind.from_pretrained(self.folder, dtype=torch.float32, **options))
        tensors = _told(self.name, lambda: _tensors(self.single))
        if tensors.keys() != outline.state_dict().keys():
            options = {"config": str(self.folder), "subfolder": self.subfolder, "dtype": torch.float32}
            return _told(self.name, lambda: kind.from_single_file(tensors, **options))
        network = kind.from_config(outline.config)
        _told(self.name, lambda: network.load_state_dict(tensors))
        return network

    def load_rest(self, denoiser: nn.Module, scheduler: SchedulerMixin) -> DiffusionPipeline:
        """The pipeline around a denoiser: autoencoder, text encoders, tokenizers."""
        parts = {self.part: denoiser, "scheduler": scheduler}
        index = _read(self.folder / INDEX)
        parts |= {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in index}
        if "safety_checker" in parts:
            parts["requires_safety_checker"] = False
        return _told(self.name, lambda: DiffusionPipeline.from_pretrained(self.folder, dtype=torch.float32, **parts))


def find_model(name: str, config: str | None = None, weights: bool = True) -> ModelFiles:
    """By a local folder (a pipeline's, or a denoiser's), one file, or a hub name.

    Args:
        config: of a single file: the folder or hub name of a pipeline of the same shape, from which all but the denoiser comes.
        weights: of a hub model also weights will be needed, not only JSON.

    Raises:
        UserError: there is no such thing, or it holds no denoiser.
    """
    path = Path(name)
    if path.suffix in SINGLE:
        if not path.is_file():
            raise UserError(f"backbone {name}: does not exist")
        if config is None:
            raise UserError(f"backbone {name}: one file does not tell its shape; give `config`, a folder or hub name of a pipeline like it")
        like = find_model(config, weights=weights)
        if not like.is_pipeline:
            raise UserError(f"backbone.config {config}: is a denoiser alone; one file needs the pipeline around it")
        return ModelFiles(name, like.folder, like.part, path)
    folder = path if path.is_dir() else _snapshot(name, weights)
    if (folder / INDEX).is_file():
        index = _read(folder / INDEX)
        for part in DENOISERS:
            if part in index and ((folder / part / CONFIG).is_file() or (folder / CONFIG).is_file()):
                return ModelFiles(name, folder, part)
        raise UserError(f"backbone {name}: a pipeline without unet/ and transformer/")
    if (folder / CONFIG).is_file():
        return ModelFiles(name, folder, "")
    raise UserError(f"backbone {name}: holds neither {INDEX} (a pipeline) nor {CONFIG} (a denoiser)")


def _snapshot(name: str, weights: bool) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"backbone {name}: no such folder, and not a hub name (owner/model)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model"] + (["*/*.safetensors", "diffusion_pytorch_model*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=UNREAD))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"backbone {name}: no such folder here, and the hub does not give it ({type(error).__name__})") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    """Of a safetensors file, or of a pickle that holds tensors alone."""
    if path.suffix == ".safetensors":
        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    return found.get("state_dict", found)


def _told(name: str, load: Any) -> Any:
    """What diffusers says of files that are missing or do not fit, in one line."""
    diffusers.utils.logging.disable_progress_bar()
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, UnpicklingError, SingleFileComponentError) as error:
        raise UserError(f"backbone {name}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error


def _class(name: Any, kind: type, path: Path) -> type:
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise UserError(f"{path}: _class_name is {name!r}, which this diffusers ({diffusers.__version__}) does not know")
    return found


def _scheduler_class(name: Any) -> type[SchedulerMixin]:
    known = [each for each in dir(diffusers) if each.endswith("Scheduler")]
    if name not in known:
        raise UserError(f"backbone.scheduler: unknown scheduler {name!r}{nearest(str(name), known)}")
    return getattr(diffusers, name)
