"""Layers of a UNet as CompVis's latent-diffusion numbers them, in diffusers' names.

With L layers a level (diffusers' layers_per_block), joined by _ as in kohya's LoRA files:

    input_blocks n, n > 0     level (n - 1) div (L + 1), layer (n - 1) mod (L + 1); the layer of number L is the downsampler
    output_blocks n           level n div (L + 1), layer n mod (L + 1); after its last layer the upsampler, where one is
    within a block            0: the residual block, 1: the attention
"""

from __future__ import annotations

import re

_INPUT = re.compile(r"input_blocks_(\d+)_([01])_(.+)")
_MIDDLE = re.compile(r"middle_block_([012])_(.+)")
_OUTPUT = re.compile(r"output_blocks_(\d+)_([012])_(.+)")
_ENDS = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
_RESIDUAL = {"in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2", "skip_connection": "conv_shortcut"}


def in_diffusers_names(flat: str, layers: int) -> str:
    """`flat` with _ for . as diffusers would have it; as it is where it is no such name.

    Args:
        layers: L, the network's layers_per_block.
    """
    if flat in _ENDS:
        return _ENDS[flat]
    if match := _INPUT.fullmatch(flat):
        level, layer = divmod(int(match[1]) - 1, layers + 1)
        if layer == layers:
            return f"down_blocks_{level}_downsamplers_0_conv" if match[3] == "op" else flat
        return f"down_blocks_{level}_{_part(int(match[2]), layer, match[3])}"
    if match := _MIDDLE.fullmatch(flat):
        place = int(match[1])
        return f"mid_block_{_part(place % 2, place // 2, match[2])}"
    if match := _OUTPUT.fullmatch(flat):
        level, layer = divmod(int(match[1]), layers + 1)
        if match[3] == "conv":
            return f"up_blocks_{level}_upsamplers_0_conv"
        return f"up_blocks_{level}_{_part(int(match[2]), layer, match[3])}"
    return flat


def _part(place: int, layer: int, inner: str) -> str:
    return f"attentions_{layer}_{inner}" if place else f"resnets_{layer}_{_RESIDUAL.get(inner, inner)}"
