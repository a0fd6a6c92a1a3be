"""What backbones with a text tower share: features of prompts, remembered while the tower is frozen, computed in chunks otherwise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vision_peft.backbones.base import Backbone
from vision_peft.backbones.clip_text import Remembered, computed_once
from vision_peft.engine.install import stamp
from vision_peft.errors import UserError


class TwoTowers(Backbone):
    """Images and texts into one space. `network` offers encode_image, encode_text (both with `normalize`) and learned_scale.

    Features are raw: neither forward() nor encode_text() normalises them, and the factor of the cosine is the task's
    (100 in the few-shot protocols, learned_scale() for the one the model was trained with).

    Args:
        text_checkpointing: recompute the text tower in the backward pass, chunk by chunk, so that a thousand classes fit.
        text_chunk: how many prompts run at once; None for all of them, or 64 with text_checkpointing.
    """

    def __init__(self, text_checkpointing: bool = False, text_chunk: int | None = None) -> None:
        super().__init__()
        if text_chunk is not None and text_chunk < 1:
            raise UserError(f"backbone.text_chunk: {text_chunk} is not a number of prompts, which is at least 1")
        self.text_checkpointing = text_checkpointing
        self.text_chunk = text_chunk or (64 if text_checkpointing else None)
        self._remembered: Remembered | None = None

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (C, L), where L is the longest prompt's length if that gives the same features, else the full context."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network.encode_image(images, normalize=False)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features (C, num_features) of token ids (C, L)."""
        chunks = tokens.to(self._device).split(self.text_chunk or len(tokens))
        if self.text_checkpointing and torch.is_grad_enabled():
            return torch.cat([checkpoint(self.network.encode_text, chunk, False, use_reentrant=False) for chunk in chunks])
        return torch.cat([self.network.encode_text(chunk, normalize=False) for chunk in chunks])

    def text_features(self, prompts: Sequence[str], frozen: bool) -> Tensor:
        """Features (C, num_features) of the prompts.

        Args:
            frozen: True while nothing in the text tower changes: computed once, then remembered until other prompts or load().
                False: computed anew at every call, with gradients; in eval mode without gradients, once until train() or eval() is
                called, an adapter changes or the precision does.
        """
        prompts = tuple(prompts)
        if self._remembered is None or self._remembered.prompts != prompts:
            with torch.inference_mode(False):
                self._remembered = Remembered(prompts, self.tokenize(prompts))
        memory = self._remembered
        if not frozen:
            memory.features = None
            return self.encode_text(memory.tokens) if torch.is_grad_enabled() or self.training else self._evaluated(memory)
        if memory.features is None or memory.features.device != self._device:
            with computed_once(self.network, self._device):
                memory.features = self.encode_text(memory.tokens)
        return memory.features

    def _evaluated(self, memory: Remembered) -> Tensor:
        key = (torch.is_autocast_enabled(self._device.type), self._device, *stamp(self.network))
        if memory.evaluated is None or memory.evaluated[0] != key:
            memory.evaluated = (key, self.encode_text(memory.tokens))
        return memory.evaluated[1]

    def train(self, mode: bool = True) -> TwoTowers:
        """Set the mode, and forget the features of the stretch of evaluation that ends or begins here."""
        if self._remembered is not None:
            self._remembered.evaluated = None
        return super().train(mode)

    def learned_scale(self) -> Tensor:
        """The factor of the cosine that the model was trained with, exp(logit_scale)."""
        return self.network.learned_scale()

    @property
    def _device(self) -> torch.device:
        return self.network.logit_scale.device
