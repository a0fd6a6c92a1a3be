"""Small diffusion pipelines with random weights in diffusers' own layout."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

UNCONDITIONAL = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
AUTOENCODER = {
    "block_out_channels": (16, 16),
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
}


def unconditional(folder: Path, **noise: object) -> Path:
    """UNet2DModel, pictures of 16 x 16."""
    torch.manual_seed(0)
    network = UNet2DModel(**UNCONDITIONAL)
    torch.nn.init.normal_(network.conv_out.weight, std=0.05)
    DDIMPipeline(network, DDIMScheduler(beta_schedule="squaredcos_cap_v2", **noise)).save_pretrained(folder)
    return folder


def stable_diffusion(folder: Path) -> Path:
    """UNet2DConditionModel on latents of 8 x 8 (pictures of 16 x 16) with a CLIP text encoder over a dozen words."""
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24, attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(**AUTOENCODER)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in letters), *letters]
    vocabulary = folder / "words"
    vocabulary.mkdir(parents=True)
    (vocabulary / "vocab.json").write_text(str({word: i for i, word in enumerate(words)}).replace("'", '"'))
    (vocabulary / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"), model_max_length=16)
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    special = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = CLIPTextModel(CLIPTextConfig(**special, **shape))
    parts = {"vae": vae, "text_encoder": text, "tokenizer": tokenizer, "unet": network, "scheduler": DDIMScheduler(clip_sample=False)}
    pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    return folder


def classes(folder: Path) -> Path:
    """DiT of 10 classes on latents of 8 x 8."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8, norm_num_groups=8,
        num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    vae = AutoencoderKL(**AUTOENCODER)
    DiTPipeline(network, vae, DDIMScheduler()).save_pretrained(folder)
    return folder
