"""all-MiniLM-L6-v2, a small sentence encoder (BERT of 6 layers, 384 wide), as the text tower of a dual encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vision_peft.backbones.offline import fetch

NAME, WIDTH, LONGEST = "offline:minilm_l6", 384, 64
SHAPE = {"vocab_size": 30522, "hidden_size": WIDTH, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


class MiniLm(nn.Module):
    """Mean of the tokens' last hidden states, unit length: (C, L) token ids, 0 for padding -> (C, 384)."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel  # takes seconds, and few backbones need it

        # eager: matrix products, which for sentences of a few tokens take half the time of torch's attention kernel
        self.bert = BertModel(BertConfig(**SHAPE, attn_implementation="eager"), add_pooling_layer=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != 0
        hidden = self.bert(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        mask = mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def load(self) -> None:
        state = load_file(fetch(NAME) / "model.safetensors")
        unused = ("pooler.", "embeddings.position_ids")
        self.bert.load_state_dict({key: value for key, value in state.items() if not key.startswith(unused)})


def tokenize(prompts: Sequence[str]) -> Tensor:
    """Token ids (C, L), L of the longest prompt and at most 64."""
    encoded = _tokenizer(fetch(NAME))(list(prompts), padding=True, truncation=True, max_length=LONGEST)
    return torch.tensor(encoded["input_ids"])


@cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
