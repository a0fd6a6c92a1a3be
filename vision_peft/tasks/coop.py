"""CoOp: the words before a class's name are learnt, as vectors in the place of token embeddings; both towers stay as they are.

    prompt of class c = [start, v_1, ..., v_M, tokens of its name, end],    v (M, E) shared by all classes
    logits = s cos(f, text(prompt_c))

Trained are the M * E numbers of v, started at N(0, 0.02^2) or at the embeddings of given words. Source: Zhou et al., "Learning to
Prompt for Vision-Language Models", 2022 (unified context, class token at the end).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_peft.backbones.base import Backbone
from vision_peft.errors import UserError
from vision_peft.tasks.heads import FrozenFeatures, Head

PLACEHOLDER = "x"  # a word of one token in CLIP's and BERT's vocabularies; M of them in a row stand where v goes
EMBEDDING = "text.token_embed"


class CoOpHead(Head):
    """Context before the data's prompts: give the data the template `{}.`, so that a prompt is the name alone.

    Args:
        context_length: M, at least 1; ignored with context_init.
        context_init: words whose embeddings v starts at, such as `a photo of a`; null for random values.
        scale: s.
    """

    def __init__(self, context_length: int = 16, context_init: str | None = None, scale: float = 100.0) -> None:
        super().__init__()
        if context_length < 1:
            raise UserError(f"model.head.context_length: must be at least 1, not {context_length}")
        self.context_length, self.context_init, self.scale = context_length, context_init, scale

    def build(self, backbone: Backbone, prompts: Sequence[str], frozen: FrozenFeatures | None) -> None:
        if not hasattr(backbone, "text_features"):
            raise UserError(f"model.head: CoOpHead needs a backbone with a text tower; {type(backbone).__name__} has none")
        object.__setattr__(self, "backbone", backbone)  # not a child: the task owns it
        embedding = _embedding(backbone)
        start = torch.randn(self.context_length, embedding.weight.shape[1]) * 0.02
        if self.context_init is not None:
            words = backbone.tokenize([self.context_init])[0]
            start = embedding.weight.detach()[words[words != 0][1:-1]].float()  # without start, end and padding
            if not len(start):
                raise UserError(f"model.head.context_init: {self.context_init!r} has no words")
        self.context = nn.Parameter(start.clone())
        before = " ".join([PLACEHOLDER] * len(start))
        self.register_buffer("tokens", backbone.tokenize([f"{before} {prompt}" for prompt in prompts]), persistent=False)
        self._placeholder = int(self.tokens[0, 1])
        if not self._stands_in(self.tokens).all():
            raise UserError(f"model.head: {type(backbone).__name__}'s tokenizer does not take {PLACEHOLDER!r} for one token")
        self._seen: tuple[int, Tensor] | None = None
        embedding.register_forward_hook(self._put_context)

    def forward(self, features: Tensor) -> Tensor:
        text = self._text().to(features.device)
        return self.scale * F.normalize(features, dim=1) @ F.normalize(text, dim=1).mT.to(features.dtype)

    def _text(self) -> Tensor:
        """Features (C, D), encoded anew while anything in them may change."""
        fixed = not torch.is_grad_enabled() and not any(target.startswith("text.") for target in self.backbone.adapted)
        if fixed and self._seen is not None and self._seen[0] == self.context._version:
            return self._seen[1]
        text = self.backbone.encode_text(self.tokens)
        self._seen = (self.context._version, text) if fixed else None
        return text

    def _stands_in(self, tokens: Tensor) -> Tensor:
        """Whether the placeholders stand in each row of tokens (C, L)."""
        place = tokens[:, 1 : 1 + len(self.context)]
        return (place == self._placeholder).all(1) & (place.shape[1] == len(self.context))

    def _put_context(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Hook of the token embedding: v in the place of placeholders; other prompts, of other users of the tower, pass unchanged."""
        if not self._stands_in(inputs[0]).all():
            return None
        context = self.context.to(output.dtype).expand(len(output), -1, -1)
        return torch.cat([output[:, :1], context, output[:, 1 + len(self.context) :]], 1)


def _embedding(backbone: Backbone) -> nn.Module:
    [path] = {site.path for site in backbone.sites() if site.target == EMBEDDING}
    return backbone.network.get_submodule(path.rpartition(".")[0])
