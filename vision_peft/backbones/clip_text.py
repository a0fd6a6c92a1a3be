"""The text side of CLIP: prompts run to their own length instead of the full context, and tokenizers made once.

A causal tower that pools at the end token never looks at what follows it, so the columns after the longest prompt can be dropped: the
same features from 14 positions instead of 77. A Hugging Face tower masks its padding, which can go as well. open_clip wants all
positions; the subclasses here do not. An instance becomes one by assignment of its `__class__`, so parameters, state_dict keys,
deepcopy and pickle stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from open_clip import CLIP, SimpleTokenizer
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn


class ShortTextTransformer(TextTransformer):
    """The text tower of CustomTextCLIP and CoCa; takes any number of tokens up to the context length."""

    calls: ClassVar = ("forward", "forward_intermediates")  # the methods that read the tensors it owns itself

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        x, mask = super()._embeds(text)  # cuts the positions, but the mask only where it adds padding to it
        length = x.shape[1]
        return x, mask if mask is None else mask[..., :length, :length]

    def needed(self, tokens: Tensor) -> int:
        """How many of the first columns of tokens (C, L) decide the features."""
        if self.attn_mask is None or self.cls_emb is not None:  # bidirectional, or pooled at a token behind the padding
            return tokens.shape[1]
        return _needed(tokens, self.pool_type, self.eos_id)


class ShortTextCLIP(CLIP):
    """CLIP whose text tower lies flat on the root; takes any number of tokens up to the context length."""

    calls: ClassVar = ("forward", "get_logits", "forward_intermediates", "encode_text", "learned_scale")

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        length = text.shape[1]
        dtype = self.transformer.get_cast_dtype()
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        x = self.token_embedding(text).to(dtype) + self.positional_embedding[:length].to(dtype)
        x = self.ln_final(self.transformer(x, attn_mask=mask))  # (C, L, width)
        x = text_global_pool(x, text, self.text_pool_type, eos_token_id=self.text_eos_id)  # (C, width)
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x

    def needed(self, tokens: Tensor) -> int:
        """How many of the first columns of tokens (C, L) decide the features."""
        return tokens.shape[1] if self.attn_mask is None else _needed(tokens, self.text_pool_type, self.text_eos_id)

    def learned_scale(self) -> Tensor:
        return self.logit_scale.exp()


class ShortHFText(HFTextEncoder):
    """A Hugging Face model as text tower; takes any number of tokens up to the context length."""

    calls: ClassVar = ("forward",)

    def needed(self, tokens: Tensor) -> int:
        """How many of the first columns of tokens (C, L) decide the features."""
        return int((tokens != self.config.pad_token_id).any(0).nonzero().max()) + 1


SHORT = (ShortTextCLIP, ShortTextTransformer, ShortHFText)


def _needed(tokens: Tensor, pool_type: str, eos_id: int) -> int:
    """Columns up to the last token that a causal tower pools at, whatever the tokens after it are."""
    if pool_type == "argmax":
        return int(tokens.argmax(dim=-1).max()) + 1
    if pool_type == "eos":
        return int((tokens == eos_id).int().argmax(dim=-1).max()) + 1
    return 1 if pool_type == "first" else tokens.shape[1]


@dataclass
class Remembered:
    """A list of prompts with its tokens and its features: while the tower is frozen, and for one stretch of evaluation."""

    prompts: tuple[str, ...]
    tokens: Tensor
    features: Tensor | None = None
    evaluated: tuple[tuple[object, ...], Tensor] | None = None  # what must not have changed, and the features


@contextmanager
def computed_once(module: nn.Module, device: torch.device) -> Iterator[None]:
    """For what is kept: evaluation mode, full precision, no gradient, and no inference tensors, which training could not use."""
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for each in training:
            each.training = True


def tokenizer(text_cfg: Mapping[str, Any]) -> SimpleTokenizer | HFTokenizer:
    """The tokenizer an open_clip `text_cfg` asks for; equal configs share one, and backbones hold none, so they copy fast."""
    name, mode = text_cfg.get("hf_tokenizer_name"), text_cfg.get("tokenizer_mode")
    options = tuple(sorted(text_cfg.get("tokenizer_kwargs", {}).items()))
    return _tokenizer(name, text_cfg.get("context_length", 77), mode, options)


@cache
def _tokenizer(name: str | None, length: int, mode: str | None, options: tuple[tuple[str, Any], ...]) -> SimpleTokenizer | HFTokenizer:
    if not name:
        return SimpleTokenizer(context_length=length, **dict(options))
    return HFTokenizer(name, context_length=length, tokenizer_mode=mode, **dict(options))
