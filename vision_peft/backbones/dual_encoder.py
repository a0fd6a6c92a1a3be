"""A small CLIP without any joint training: an ImageNet classifier and a sentence encoder, joined by the names of ImageNet's classes.

The image feature is the mean of the class names' text embeddings under the classifier's posterior ("ConSE"; Norouzi et al., "Zero-Shot
Learning by Convex Combination of Semantic Embeddings", 2014), so images and sentences meet in the sentence encoder's space:

    image:  z = sum_c p(c | x) (t_c - m)        text:  z = t(prompt) - m        m = mean_c t_c

t is all-MiniLM-L6-v2's unit vector (384,), p the posterior of EfficientNet-Lite0 over 1000 classes. t_c is the mean over three
templates, once with the first name and once with all synonyms of a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from torch import Tensor, nn
from tqdm.auto import tqdm

from vision_peft.backbones import bert_names, minilm
from vision_peft.backbones.base import Preprocess
from vision_peft.backbones.clip_network import one_line
from vision_peft.backbones.offline import carrier, fetch
from vision_peft.backbones.timm_sites import name_sites, trace
from vision_peft.backbones.two_towers import TwoTowers
from vision_peft.engine.site import Site, enumerate_sites, renamer
from vision_peft.errors import UserError
from vision_peft.user_cache import cache_folder, keep_tensors

IMAGES, CLASSES = "offline:effnet_lite0", 1000
TEMPLATES = ("a photo of a {}.", "{}", "a picture showing a {}.")
SCALE = 20.0  # of the cosine: nothing was trained, so it is a choice


class ConseTower(nn.Module):
    """Images (B, 3, S, S) -> features (B, 384)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = timm.create_model("tf_efficientnet_lite0", num_classes=CLASSES)
        self.register_buffer("classes", torch.zeros(CLASSES, minilm.WIDTH), persistent=False)  # follows from the text tower

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images).softmax(-1) @ self.classes


class CentredText(minilm.MiniLm):
    """Sentence vectors with the mean of ImageNet's classes at the origin."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(minilm.WIDTH), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) - self.centre


class JoinedTowers(nn.Module):
    calls: ClassVar = ("forward", "learned_scale")  # the methods that read the tensors it owns itself

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.text = ConseTower(), CentredText()
        self.logit_scale = nn.Parameter(torch.tensor(SCALE).log())

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        return self.learned_scale() * self.encode_image(images, True) @ self.encode_text(tokens, True).mT

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        features = self.text(tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def learned_scale(self) -> Tensor:
        return self.logit_scale.exp()


class DualEncoder(TwoTowers):
    """EfficientNet-Lite0 and MiniLM as one zero-shot classifier; both towers can be adapted. Weights come through pip, see offline.

    Args:
        image_size: side of the image in pixels; 160 is where the classifier's own accuracy was measured.
        weights: file (.safetensors) of the joined network, such as `vision-peft merge` writes, to take the place of the packages'.
        text_checkpointing, text_chunk: see TwoTowers.
    """

    def __init__(
        self, image_size: int = 160, *, weights: str | None = None, text_checkpointing: bool = False, text_chunk: int | None = None
    ) -> None:
        super().__init__(text_checkpointing, text_chunk)
        if image_size < 32:
            raise UserError(f"backbone.image_size: {image_size} is below the 32 pixels that the network shrinks to one")
        if weights is not None and not Path(weights).is_file():
            raise UserError(f"backbone.weights: {weights} is no file")
        self.weights = weights
        with torch.device("meta"):
            self.network = JoinedTowers().requires_grad_(False)
        self._sites = _sites(self.network, image_size)
        self.num_features = minilm.WIDTH
        self.preprocess = Preprocess(image_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
        self.train(self.training)

    def load(self) -> None:
        if not self.network.logit_scale.is_meta:
            return
        network = JoinedTowers()
        network.visual.trunk.load_state_dict(load_file(fetch(IMAGES)))
        network.text.load()
        names = _class_embeddings(network.text.eval())
        network.text.centre.copy_(names.mean(0))
        network.visual.classes.copy_(names - names.mean(0))
        if self.weights is not None:
            _fill(network, self.weights)
        self.network = network.requires_grad_(False)
        self._remembered = None
        self.train(self.training)

    def train(self, mode: bool = True) -> DualEncoder:
        """Set the mode of all but what would drift or shake the frozen towers: BatchNorm and BERT's own dropout stay in eval mode."""
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
                module.eval()
        return self

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        return minilm.tokenize(prompts)

    def sites(self) -> list[Site]:
        return list(self._sites)

    def describe(self) -> dict[str, Any]:
        own = {"class": type(self).__name__, "name": f"{IMAGES}+{minilm.NAME}"}
        return {**own, "weights": self.weights, "image_size": self.preprocess.size}


def _sites(network: JoinedTowers, image_size: int) -> list[Site]:
    """Every parameter: the image tower as Vit names a timm network, the text tower by a BERT's rules."""
    called, _ = trace(network.visual.trunk, image_size)
    path = "visual.trunk"
    image = {}
    for site in name_sites(network.visual.trunk, called, ("forward",)):
        site = replace(site, reader=f"{path}.{site.reader}" if site.reader else path)
        image.setdefault(site.path, []).append(site)
    rules = [*bert_names.RULES, (r"(.+)", r"\1")]
    return [named for site in enumerate_sites(network, renamer(rules), calls={"": network.calls}) for named in image.get(site.path, [site])]


def _fill(network: JoinedTowers, path: str) -> None:
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"backbone.weights: {path} cannot be loaded as the joined network: {one_line(error)}") from error


@torch.no_grad()
def _class_embeddings(text: CentredText) -> Tensor:
    """t_c (1000, 384), before centring; computed once and kept in the user's cache."""
    path = cache_folder("offline") / f"imagenet_names-{carrier(minilm.NAME).sha256[:8]}.safetensors"
    if path.is_file():
        return load_file(path)["text"]
    info = ImageNetInfo()
    synonyms = [info.index_to_description(index) for index in range(CLASSES)]
    total = torch.zeros(CLASSES, minilm.WIDTH)
    for names in tqdm(([name.split(",")[0] for name in synonyms], synonyms), "names of ImageNet's classes, once"):
        prompts = [[template.format(name) for name in names] for template in TEMPLATES]
        summed = sum(torch.cat([text(minilm.tokenize(each[at : at + 50])) for at in range(0, CLASSES, 50)]) for each in prompts)
        total += F.normalize(summed, dim=-1) / 2
    keep_tensors(path, {"text": total})
    return total
