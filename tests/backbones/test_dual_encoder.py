"""The joined image and text towers: the convex combination written out, padding without influence, names, and real zero-shot accuracy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

from vision_peft.adapters.lora import LoRA
from vision_peft.backbones import DualEncoder
from vision_peft.backbones.dual_encoder import JoinedTowers
from vision_peft.data.csv_source import CsvSource
from vision_peft.data.fewshot_images import FewShotImages
from vision_peft.engine.install import attach
from vision_peft.errors import UserError

TOKENS = torch.tensor([[101, 1037, 4937, 102, 0, 0], [101, 1037, 6302, 1997, 3899, 102]])  # 0 is padding


@pytest.fixture(scope="module")
def network() -> JoinedTowers:
    torch.manual_seed(0)
    network = JoinedTowers().requires_grad_(False).eval()
    torch.nn.init.normal_(network.visual.classes)
    torch.nn.init.normal_(network.text.centre, std=0.01)
    return network


def test_an_image_is_the_mean_of_the_class_texts_under_its_posterior(network):
    images = torch.randn(2, 3, 64, 64)
    posterior = network.visual.trunk(images).softmax(-1)
    by_hand = sum(posterior[:, c, None] * network.visual.classes[c] for c in range(1000))
    torch.testing.assert_close(network.encode_image(images), by_hand, rtol=1e-4, atol=1e-5)


def test_padding_has_no_influence_and_the_centre_is_taken_off(network):
    torch.testing.assert_close(network.encode_text(TOKENS)[:1], network.encode_text(TOKENS[:1, :4]), rtol=1e-4, atol=1e-5)
    norms = (network.encode_text(TOKENS) + network.text.centre).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(2))


def test_layers_of_both_towers_have_canonical_names():
    backbone = DualEncoder(64)
    shapes = {site.name: site.shape for site in backbone.sites()}
    assert shapes["text.3.attn.q"] == (384, 384)
    assert shapes["text.5.mlp.fc1"] == (1536, 384)
    assert shapes["vision.classifier"] == (1000, 1280)
    assert {site.path for site in backbone.sites()} == {name for name, _ in backbone.network.named_parameters()}


def test_an_adapter_in_either_tower_is_read(network):
    backbone = DualEncoder(64)
    adapters = attach(network, LoRA(rank=2), ["text.0.attn.v", "vision.conv_head"], sites=backbone.sites())
    loss = network(torch.randn(2, 3, 64, 64), TOKENS).square().sum()
    loss.backward()
    assert all(adapter.B.grad.any() for adapter in adapters.adapters.values())


def test_too_small_an_image_is_refused():
    with pytest.raises(UserError, match=r"backbone\.image_size: 16 is below the 32 pixels"):
        DualEncoder(16)


@pytest.mark.slow
def test_zero_shot_on_objects_it_was_never_shown():
    """A quarter of caltech101's test pictures, one template: 44.7 % of 100 classes on all of them; chance is 1 %."""
    data = FewShotImages(CsvSource("caltech101/split.csv"), shots=1)
    backbone = DualEncoder()
    backbone.load()
    backbone.eval()
    data.preprocess = backbone.preprocess
    data.setup("test")
    pictures = Subset(data.test_dataset, range(0, len(data.test_records), 4))
    text = F.normalize(backbone.text_features(data.prompts(), frozen=True), dim=1)
    right = 0
    with torch.no_grad():
        for images, labels in DataLoader(pictures, batch_size=32):
            right += int(((F.normalize(backbone(images), dim=1) @ text.mT).argmax(1) == labels).sum())
    assert right / len(pictures) > 0.38
