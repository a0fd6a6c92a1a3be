"""What the frozen parts around a denoiser say of pictures and prompts, computed once, in memory or on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vision_peft.backbones.diffusion import Condition, Diffusion
from vision_peft.engine.fingerprint import fingerprint
from vision_peft.user_cache import cache_folder, kept_tensors

BATCH = 8  # pictures that pass the autoencoder at once
NESTED = "/"


class FrozenEncodings:
    """Exact: of pictures the posterior is kept, from which every step draws its own latents.

    Args:
        backbone: loaded.
        kept: `memory`, or `disk`: in the user's cache as well, under keys made of all they depend on.
    """

    def __init__(self, backbone: Diffusion, kept: Literal["memory", "disk"]) -> None:
        self.backbone, self.on_disk = backbone, kept == "disk"
        self._told: dict[str, Condition] = {}
        self._marks: dict[str, str] = {}

    def posteriors(self, images: Tensor) -> Tensor:
        """(N, C, h, w) in float32 for Diffusion.draw(), on the CPU, of uint8 pictures (N, 3, S, S)."""

        def compute() -> dict[str, Tensor]:
            parts = tqdm(images.split(BATCH), "autoencoder", disable=len(images) <= 4 * BATCH)
            device = self.backbone.device
            return {"posterior": torch.cat([self.backbone.posterior(part.to(device) / 127.5 - 1).float().cpu() for part in parts])}

        own = hashlib.sha256(images.contiguous().numpy()).hexdigest()
        return self._kept("latents", f"{tuple(images.shape)}/{own}", ["vae"], compute)["posterior"]

    def condition(self, prompts: list[str]) -> Condition:
        """What the denoiser is told of prompts, on its device; see Diffusion.condition()."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._told:
                self._told[prompt] = self._of_text(prompt) if self.backbone.is_conditional else self.backbone.condition([prompt])
        return _joined([self._told[prompt] for prompt in prompts])

    @property
    def text_encoders(self) -> list[str]:
        return [part for part, _ in self.backbone.named_children() if part.startswith("text_encoder")]

    def marks(self, parts: Sequence[str]) -> str:
        """Fingerprints of parts of the backbone, each computed once."""
        for part in parts:
            if part not in self._marks:
                self._marks[part] = fingerprint(getattr(self.backbone, part))
        return "/".join(self._marks[part] for part in parts)

    def _of_text(self, prompt: str) -> Condition:
        facts = f"{type(self.backbone.network).__name__}/{self.backbone.preprocess.size}/{prompt}"
        found = self._kept("prompts", facts, self.text_encoders, lambda: _flat(self.backbone.condition([prompt])))
        return _nested({key: value.to(self.backbone.device) for key, value in found.items()})

    def _kept(self, kind: str, facts: str, parts: Sequence[str], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.backbone.device.type, enabled=False):
            if not self.on_disk:
                return compute()
            name = hashlib.sha256(f"{self.marks(parts)}/{facts}".encode()).hexdigest()[:32]
            return kept_tensors(cache_folder(kind) / f"{name}.safetensors", compute)


def _flat(condition: Condition) -> dict[str, Tensor]:
    """Tensors by path; a condition's values are tensors or dictionaries of tensors."""
    found: dict[str, Tensor] = {}
    for key, value in condition.items():
        found |= {f"{key}{NESTED}{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _nested(tensors: dict[str, Tensor]) -> Condition:
    found: Condition = {}
    for path, tensor in tensors.items():
        key, _, inner = path.partition(NESTED)
        if inner:
            found.setdefault(key, {})[inner] = tensor
        else:
            found[key] = tensor
    return found


def _joined(conditions: list[Condition]) -> Condition:
    """One of a batch from those of single prompts."""
    each = [_flat(condition) for condition in conditions]
    return _nested({key: torch.cat([one[key] for one in each]) for key in each[0]})
