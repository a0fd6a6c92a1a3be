"""The open_clip model put together from parts: DINOv2 in open_clip's layers, the text's centre, a folder that reads back."""

from __future__ import annotations

import pytest
import torch
from open_clip.transformer import LayerNorm, VisionTransformer

from vision_peft.backbones import Clip, Vit
from vision_peft.backbones.clip_from_parts import CONFIG, centre_text, image_state, network_from_parts, write_folder

PROMPTS = ["a photo of a cat.", "a photo of a European fire salamander."]


def test_open_clips_layers_compute_what_timms_do():
    torch.manual_seed(0)
    vit = Vit("vit_small_patch14_dinov2", image_size=42, depth=2, pretrained=False)
    vit.load()
    for parameter in vit.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    size = {"image_size": 42, "patch_size": 14, "width": 384, "layers": 2, "heads": 6, "mlp_ratio": 4, "output_dim": 384}
    tower = VisionTransformer(**size, ls_init_value=1.0, no_ln_pre=True, pool_type="avg", norm_layer=lambda n: LayerNorm(n, eps=1e-6))
    tower.load_state_dict(image_state(vit.network.state_dict()))
    images = torch.randn(2, 3, 42, 42)
    torch.testing.assert_close(tower.eval()(images), vit.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_folder_is_an_open_clip_model_with_both_towers(tmp_path):
    network = network_from_parts()
    images, centre = torch.randn(2, 3, 112, 112), torch.randn(384)
    write_folder(network, tmp_path)
    backbone = Clip(f"local-dir:{tmp_path}")
    backbone.load()
    backbone.eval()
    vit = Vit("offline:dinov2_vits14", image_size=112)
    vit.load()
    torch.testing.assert_close(backbone(images), vit.eval()(images), rtol=1e-4, atol=1e-4)
    tokens = backbone.tokenize(PROMPTS)
    before = backbone.encode_text(tokens)
    centre_text(backbone.network, centre)
    torch.testing.assert_close(backbone.encode_text(tokens), before - centre, rtol=1e-4, atol=1e-4)
    targets = {site.target for site in backbone.sites()}
    blocks = [(tower, block) for tower, depth in (("vision", CONFIG["vision_cfg"]["layers"]), ("text", 6)) for block in range(depth)]
    assert {f"{tower}.{block}.attn.q" for tower, block in blocks} <= targets
