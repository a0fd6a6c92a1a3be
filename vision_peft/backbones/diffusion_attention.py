"""diffusers' attention by engine.dot_product: where torch's kernel is the slower one, by matrix products."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from vision_peft.engine.dot_product import dot_product


class ChosenAttnProcessor(AttnProcessor2_0):
    """Self and cross attention of UNets and transformers; computes what its base class does."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Tokens (B, N, C), or a map (B, C, H, W), attend to themselves or to (B, M, D); the output has their shape."""
        x = hidden_states if hidden_states.ndim == 3 else hidden_states.flatten(2).mT
        if attn.group_norm is not None:
            x = attn.group_norm(x.mT).mT
        context = x if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        q, k, v = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in projected)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(x))  # (B * heads, 1 or N, M)
            attention_mask = attention_mask.unflatten(0, (len(x), attn.heads)).to(q.dtype)
        y = dot_product(q, k, v, attention_mask).transpose(1, 2).flatten(2)
        for layer in attn.to_out:  # the projection and its dropout
            y = layer(y)
        if hidden_states.ndim == 4:
            y = y.mT.reshape(hidden_states.shape)
        if attn.residual_connection:
            y = y + hidden_states
        return y / attn.rescale_output_factor if attn.rescale_output_factor != 1 else y


def choose_attention(network: nn.Module) -> None:
    """Put it in the place of the plain attention of a denoiser."""
    for module in network.modules():
        if isinstance(module, Attention) and _is_plain(module):
            module.set_processor(ChosenAttnProcessor())


def _is_plain(attn: Attention) -> bool:
    unusual = (attn.spatial_norm, attn.norm_cross, attn.norm_q, attn.norm_k, attn.fused_projections or None)
    return type(attn.processor) is AttnProcessor2_0 and all(each is None for each in unusual) and attn.to_k is not None
