"""timm backbones: names, readers, cuts, and features that mean something."""

import copy
import csv
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.layers.attention import Attention
from torch import nn
from torchvision.transforms import v2

from vision_peft.backbones.vit import Vit
from vision_peft.engine.adapter import Adapter
from vision_peft.engine.readers import make_reader
from vision_peft.engine.views import State
from vision_peft.errors import UserError

SMALL = {
    "vit_tiny_patch16_224": {"image_size": 32, "depth": 3},
    "swin_tiny_patch4_window7_224": {},
    "convnext_atto": {"image_size": 64},
    "tf_efficientnet_lite0": {"image_size": 64},
    "resnet18": {"image_size": 64},
}
FUNCTIONAL_QKV = ("beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256")


def random_vit(name: str = "vit_tiny_patch16_224", **options) -> Vit:
    """A loaded network with random weights, none of them all zeros, in eval mode."""
    torch.manual_seed(0)
    backbone = Vit(name, pretrained=False, **(options or SMALL.get(name, {})))
    backbone.load()
    for parameter in backbone.parameters():
        if not parameter.any():  # timm starts some norms, biases and tokens at zero, which would hide what they multiply
            parameter.normal_(std=0.1)
    return backbone.eval()


def images(backbone: Vit, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, backbone.image_size, backbone.image_size, generator=torch.Generator().manual_seed(1))


# names and readers


@pytest.mark.parametrize("name", [*SMALL, "vit_small_patch14_dinov2", "efficientnet_b0", "vit_base_patch16_siglip_224", *FUNCTIONAL_QKV])
def test_sites_cover_every_parameter_once_under_unique_names(name):
    backbone = Vit(name)
    names = [site.name for site in backbone.sites()]
    assert len(set(names)) == len(names)
    assert all(name.startswith("vision.") for name in names)
    shapes = {key: tensor.shape for key, tensor in backbone.network.named_parameters()}
    rows = dict.fromkeys(shapes, 0)
    for site in backbone.sites():
        rows[site.path] += site.shape[0]
    assert rows == {key: shape[0] for key, shape in shapes.items()}


def test_construction_reads_no_weights():
    backbone = Vit("vit_small_patch14_dinov2.lvd142m", weights=None)
    assert all(tensor.is_meta for tensor in backbone.network.state_dict().values())
    assert backbone.num_features == 384 and backbone.num_blocks == 12


def test_names_of_a_vision_transformer():
    sites = {site.name: site for site in Vit().sites()}
    for name in ("vision.patch_embed", "vision.pos_embed", "vision.cls_token", "vision.norm.weight", "vision.8.norm1.weight"):
        assert name in sites
    layers = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.fc1", "mlp.fc2")
    assert {f"vision.8.{layer}" for layer in layers} <= sites.keys()
    assert sites["vision.3.attn.k"].path == "blocks.3.attn.qkv.weight" and sites["vision.3.attn.k"].rows == (384, 768)
    assert "vision.9.attn.q" not in sites  # 9 of the 12 blocks


def test_names_of_staged_networks():
    assert "vision.blocks.2.1.conv_dw" in {site.name for site in Vit("offline:effnet_lite0").sites()}
    swin = {site.name for site in Vit("swin_tiny_patch4_window7_224").sites()}
    assert {"vision.layers.0.blocks.1.attn.v", "vision.layers.0.blocks.1.attn.out", "vision.layers.1.downsample.reduction"} <= swin


def test_pooling_attention_is_named_by_its_parts():
    assert {"vision.attn_pool.k", "vision.attn_pool.v"} <= {site.name for site in Vit("vit_base_patch16_siglip_224").sites()}


class Zero(Adapter):
    """Replaces a weight by zeros."""

    def weight(self, W):
        return torch.zeros_like(W)


@pytest.mark.parametrize(
    ("name", "options", "target"),
    [
        ("vit_tiny_patch16_224", SMALL["vit_tiny_patch16_224"], "vision.pos_embed"),
        ("vit_tiny_patch16_224", SMALL["vit_tiny_patch16_224"], "vision.cls_token"),
        ("vit_tiny_patch16_224", SMALL["vit_tiny_patch16_224"], "vision.1.attn.v"),
        ("resnet18", SMALL["resnet18"], "vision.layer2.0.conv1"),
        ("eva02_tiny_patch14_224", {"image_size": 28, "depth": 2}, "vision.1.attn.v"),
        ("swinv2_tiny_window8_256", {}, "vision.layers.2.blocks.1.attn.v"),
    ],
)
def test_the_named_reader_is_the_one_that_reads(name, options, target):
    """Shadowing a site in its reader's calls has the effect of changing the parameter, in the whole pass and in the cut one."""
    options = {**options, "pool": "token"} if target == "vision.cls_token" else options
    backbone = random_vit(name, **options)
    x, site = images(backbone), next(site for site in backbone.sites() if site.name == target)
    with torch.no_grad():
        before, changed = backbone(x), copy.deepcopy(backbone)
        site.slice(changed.network.get_parameter(site.path)).zero_()
        state = State()
        state.mix["test"] = 1.0
        reader = make_reader(backbone.network.get_submodule(site.reader), state, site.calls)
        reader.view(site.parameter).add("test", site, Zero())
        assert not torch.equal(before, changed(x))
        assert torch.equal(backbone(x), changed(x))
        if backbone.num_blocks:
            assert torch.equal(backbone.suffix(backbone.prefix(x, 1), 1), changed(x))


# cuts


@pytest.mark.parametrize("name", SMALL)
def test_prefix_then_suffix_is_forward_at_every_block(name):
    backbone = random_vit(name)
    x = images(backbone)
    with torch.no_grad():
        features = backbone(x)
        assert features.shape == (2, backbone.num_features)
        assert backbone.num_blocks >= 3
        for block in range(backbone.num_blocks + 1):
            assert torch.equal(backbone.suffix(backbone.prefix(x, block), block), features)


def test_first_block():
    backbone = Vit()
    assert backbone.first_block({"vision.5.attn.q", "vision.7.mlp.fc1"}) == 5
    assert backbone.first_block({"vision.norm"}) == backbone.first_block(set()) == 9
    assert backbone.first_block({"vision.patch_embed", "vision.5.attn.q"}) == 0
    assert Vit("offline:effnet_lite0").first_block({"vision.blocks.4.1.conv_pw", "vision.conv_head"}) == 4


def test_a_network_of_unknown_structure_is_not_cut():
    backbone = Vit("beit_base_patch16_224")
    assert backbone.num_blocks == 0 and backbone.first_block({"vision.3.attn.q"}) == 0
    with pytest.raises(TypeError):
        backbone.prefix(torch.empty(0), 1)


# modes and freezing


def test_batch_norm_keeps_its_statistics_and_everything_is_frozen():
    backbone = random_vit("resnet18").train()
    before = copy.deepcopy(backbone.network.state_dict())
    backbone(images(backbone))
    assert all(torch.equal(before[key], value) for key, value in backbone.network.state_dict().items())
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert backbone.network.layer1.training and backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_load_is_idempotent():
    backbone = random_vit()
    network = backbone.network
    backbone.load()
    assert backbone.network is network


# errors of the user's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_smal_patch16_224"}, "vit_small_patch16_224"),
        ({"name": "vit_tiny_patch16_224.augreg"}, "vit_tiny_patch16_224.augreg_in21k"),
        ({"name": "offline:dinov2"}, "did you mean offline:dinov2_vits14"),
        ({"name": "offline:minilm_l6"}, "no image encoder"),
        ({"image_size": 100}, "multiple of the patch size 14; nearest are 98 and 112"),
        ({"image_size": 0}, "must be positive"),
        ({"depth": 13}, "from 1 to 12"),
        ({"name": "resnet18", "depth": 2}, "applies to vision transformers"),
        ({"name": "resnet18", "pool": "token"}, "pool token"),
        ({"name": "resnet18", "weights": "absent.pt"}, "no such file"),
        ({"name": "resnet18", "weights": "archive.npz"}, "must end in"),
        ({"weights": "absent.pt"}, "has its own weights"),
        ({"name": "resnet18", "weights": "absent.pt", "pretrained": False}, "contradict"),
    ],
)
def test_bad_arguments_are_answered_in_one_line_at_construction(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        Vit(**arguments)
    assert "\n" not in str(caught.value)


# the offline weights


@pytest.mark.parametrize(("name", "least"), [("offline:dinov2_vits14", 0.3), ("offline:effnet_lite0", 0.5)])
def test_features_of_real_images_tell_textures_apart(name, least):
    """Nearest class mean from 4 images of each of dtd10's 10 classes, on 4 others of each; chance is 0.1."""
    root = Path(os.environ.get("VISION_PEFT_DATA", "datasets")) / "dtd10"
    if not (root / "split.csv").is_file():
        pytest.skip(f"real images of dtd10 are not at {root} (set VISION_PEFT_DATA)")
    backbone = Vit(name)
    backbone.load()
    backbone.eval()
    train, train_labels = _features(backbone, root, "train", 4)
    test, labels = _features(backbone, root, "test", 4)
    means = nn.functional.normalize(torch.stack([train[train_labels == label].mean(0) for label in labels.unique()]))
    accuracy = ((test @ means.T).argmax(1) == labels).float().mean().item()
    assert accuracy >= least


def _features(backbone: Vit, root: Path, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised features and labels of the first `count` images of every class."""
    with (root / "split.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    by_class: dict[str, list[str]] = {}
    for row in rows:
        by_class.setdefault(row["label"], []).append(row["path"])
    how = backbone.preprocess
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(round(how.size / how.crop), interpolation=v2.InterpolationMode(how.interpolation)),
            v2.CenterCrop(how.size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(how.mean, how.std),
        ]
    )
    labels = sorted(by_class)
    paths = [root / path for label in labels for path in by_class[label][:count]]
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.inference_mode():
        features = nn.functional.normalize(backbone(batch))
    return features, torch.arange(len(labels)).repeat_interleave(count)


def test_attention_in_bfloat16_is_no_less_exact_than_timms():
    """Matrix products in the place of torch's kernel: the same function, rounded elsewhere."""
    torch.manual_seed(0)
    backbone = Vit("vit_tiny_patch16_224", image_size=64, depth=3, pretrained=False)
    backbone.load()
    ours, theirs = backbone.network.eval(), copy.deepcopy(backbone.network).eval()
    for module in theirs.modules():
        if isinstance(module, Attention):
            module.__class__ = Attention
    assert not [module for module in ours.modules() if type(module) is Attention]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = theirs(images)
        assert torch.equal(ours(images), exact)  # in float32 it is the kernel
        with torch.autocast("cpu", torch.bfloat16):
            errors = [(network(images).float() - exact).norm() for network in (ours, theirs)]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("name, size", [("vit_tiny_patch16_224", 32), ("resnet18", 64), ("swin_tiny_patch4_window7_224", 224)])
def test_pool_none_keeps_every_place(name, size):
    """What a mean would pool, place after place; without class token, and through a cut as well."""
    backbone = Vit(name, image_size=size, pretrained=False, pool="none")
    backbone.load()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features, hidden = backbone.eval()(x), backbone.network.forward_features(x)
        expected = hidden[:, 1:] if name.startswith("vit") else hidden
        torch.testing.assert_close(features, expected.flatten(1))
        torch.testing.assert_close(backbone.suffix(backbone.prefix(x, 1), 1), features)
    assert features.shape == (2, backbone.num_features)
