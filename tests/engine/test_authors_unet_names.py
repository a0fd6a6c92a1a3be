"""Names in the layout of latent-diffusion, against diffusers' own conversion of LoRA files and of checkpoints."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from torch import nn

from vision_peft.engine.authors_unet_names import in_diffusers_names

XL = {
    "block_out_channels": (32, 64, 64), "layers_per_block": 2, "cross_attention_dim": 24, "attention_head_dim": 8, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "transformer_layers_per_block": (1, 2, 3),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def xl():
    with torch.device("meta"):
        return UNet2DConditionModel(**XL)


ATTENTION = ("transformer_blocks_0_attn1_to_q", "transformer_blocks_0_ff_net_0_proj", "proj_in")


@pytest.mark.parametrize("place", ["input_blocks_4_1", "input_blocks_8_1", "middle_block_1", "output_blocks_0_1", "output_blocks_5_1"])
@pytest.mark.parametrize("inner", ATTENTION)
def test_attention_is_where_diffusers_looks(xl, place, inner):
    key = f"lora_unet_{place}_{inner}.lora_down.weight"
    (expected,) = _maybe_map_sgm_blocks_to_diffusers({key: None}, xl.config)
    for theirs, ours in (("input_blocks", "down_blocks"), ("middle_block", "mid_block"), ("output_blocks", "up_blocks")):
        expected = expected.replace(theirs, ours)  # as it goes on to do
    found = in_diffusers_names(f"{place}_{inner}", XL["layers_per_block"])
    assert f"lora_unet_{found}.lora_down.weight" == expected
    assert found in {name.replace(".", "_") for name, _ in xl.named_modules()}


@pytest.mark.parametrize("flat, expected", [
    ("input_blocks_0_0", "conv_in"), ("input_blocks_1_0_in_layers_2", "down_blocks_0_resnets_0_conv1"),
    ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
    ("input_blocks_4_0_skip_connection", "down_blocks_1_resnets_0_conv_shortcut"),
    ("middle_block_2_out_layers_3", "mid_block_resnets_1_conv2"), ("output_blocks_2_2_conv", "up_blocks_0_upsamplers_0_conv"),
    ("output_blocks_8_0_emb_layers_1", "up_blocks_2_resnets_2_time_emb_proj"), ("time_embed_2", "time_embedding_linear_2"),
    ("label_emb_0_0", "add_embedding_linear_1"), ("out_2", "conv_out"), ("down_blocks_0_resnets_0_conv1", "down_blocks_0_resnets_0_conv1"),
])  # fmt: skip
def test_every_kind_of_layer(xl, flat, expected):
    found = in_diffusers_names(flat, XL["layers_per_block"])
    assert found == expected
    modules = {name.replace(".", "_"): module for name, module in xl.named_modules()}
    assert isinstance(modules[found], (nn.Linear, nn.Conv2d))
