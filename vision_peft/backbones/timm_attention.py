"""timm's attention by engine.dot_product: where torch's kernel is the slower one, by matrix products."""

from __future__ import annotations

from timm.layers.attention import Attention
from torch import Tensor, nn

from vision_peft.engine.dot_product import dot_product


class ChosenAttention(Attention):
    """An instance of timm's Attention becomes one by its `__class__`; same parameters, same function."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if is_causal or attn_mask is not None:
            return super().forward(x, attn_mask, is_causal)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        y = dot_product(q, k, v, dropout=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(self.norm(y.transpose(1, 2).flatten(2))))


def choose_attention(network: nn.Module) -> None:
    """Put it in the place of the plain attention of a vision transformer."""
    for module in network.modules():
        if type(module) is Attention and getattr(module, "gate", None) is None:
            module.__class__ = ChosenAttention
