"""SAM: the same function as segment-anything's own modules, at any size, from any layout of its checkpoint; named sites; a timm encoder."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, TwoWayTransformer
from torch import nn

from vision_peft.adapters.full import Full
from vision_peft.adapters.lora import LoRA
from vision_peft.adapters.salt import SALT
from vision_peft.backbones import Sam, sam_attention
from vision_peft.backbones.sam_attention import FoldedAttention
from vision_peft.backbones.segmentation import Prompts
from vision_peft.engine.adapter import find_method
from vision_peft.engine.contract import CHECKS, run_contract
from vision_peft.engine.dot_product import by_products, in_pieces
from vision_peft.engine.install import attach, detach
from vision_peft.engine.targets import resolve
from vision_peft.errors import UserError

SALT_SITES = ["vision.*.attn.qkv", "vision.*.attn.out", "vision.*.mlp.*", "neck.{0,2}"]


def stirred(size: int = 128, **options) -> Sam:
    """The tiny SAM with no tensor at zero, relative positions included."""
    backbone = Sam("tiny", image_size=size, **options)
    backbone.load()
    with torch.no_grad():
        for parameter in backbone.network.parameters():
            parameter.normal_(0, 0.1)
    return backbone.eval()


def stock_encoder(backbone: Sam, size: int = 128) -> ImageEncoderViT:
    norm = partial(nn.LayerNorm, eps=1e-6)
    shape = {"embed_dim": 64, "depth": 4, "num_heads": 4, "window_size": 3, "global_attn_indexes": (1, 3)}
    stock = ImageEncoderViT(img_size=size, use_rel_pos=True, norm_layer=norm, **shape)
    stock.load_state_dict(backbone.network.image_encoder.state_dict())
    return stock.eval()


def stock_decoder(backbone: Sam) -> MaskDecoder:
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    stock = MaskDecoder(transformer_dim=256, transformer=transformer)
    stock.load_state_dict(backbone.network.mask_decoder.state_dict())
    return stock.eval()


@torch.no_grad()
@pytest.mark.parametrize("size", [128, 144])  # 8 and 9 patches a side: windows of 3 with and without padding
def test_encoder_equals_segment_anythings(size):
    backbone = stirred(size)
    images = torch.randn(2, 3, size, size)
    expected = stock_encoder(backbone, size)(images)
    assert expected.std() > 0.05
    torch.testing.assert_close(backbone(images), expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_folded_attention_is_exact_on_the_memory_saving_path_too():
    """More tokens than matrix products are used for: torch's kernel, with values padded to the longer keys."""
    stock = ImageEncoderViT(img_size=16, embed_dim=32, depth=1, num_heads=2, use_rel_pos=True).blocks[0].attn
    stock.rel_pos_h, stock.rel_pos_w = (nn.Parameter(0.3 * torch.randn(2 * 34 - 1, 16)) for _ in range(2))
    x = torch.randn(1, 34, 34, 32)
    expected = stock(x)
    stock.__class__ = FoldedAttention
    torch.testing.assert_close(stock(x), expected, atol=8e-7, rtol=1e-5)


def test_every_path_of_attention_gives_the_same_output_and_gradients():
    found = []
    for path in (by_products, in_pieces, sam_attention._by_kernel):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 1100, width, requires_grad=True) for width in (12, 12, 8))
        out = path(0.3 * q, k, v)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for other in found[1:]:
        for tensor, expected in zip(other, found[0]):
            torch.testing.assert_close(tensor, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_batch_with_one_prompt_each_equals_one_image_at_a_time():
    backbone = stirred()
    images = torch.randn(3, 3, 128, 128)
    points, labels = 128 * torch.rand(3, 2, 2), torch.tensor([[1, 0], [1, 1], [1, -1]])
    boxes = torch.tensor([[10.0, 20, 60, 90], [0, 0, 127, 127], [30, 30, 40, 40]])
    guesses = torch.randn(3, 1, *backbone.mask_size)
    stock, encoder, prompter = stock_decoder(backbone), stock_encoder(backbone), backbone.network.prompt_encoder
    for prompts in (
        Prompts(points=points, labels=labels),
        Prompts(boxes=boxes),
        Prompts(points=points, labels=labels, boxes=boxes, masks=guesses),
        Prompts(),
    ):
        found = backbone.decode(backbone(images), prompts)
        assert found.logits.shape == (3, 1, 32, 32) and found.quality.shape == (3, 1)
        for i in range(3):
            one = [None if each is None else each[i : i + 1] for each in (prompts.points, prompts.labels, prompts.boxes, prompts.masks)]
            sparse, dense = prompter(None if one[0] is None else (one[0], one[1]), one[2], one[3])
            expected, quality = stock(encoder(images[i : i + 1]), prompter.get_dense_pe(), sparse, dense, multimask_output=False)
            torch.testing.assert_close(found.logits[i : i + 1], expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.quality[i : i + 1], quality, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_half_precision_does_not_touch_the_position_encodings():
    backbone = stirred()
    embedding, prompts = torch.randn(1, 256, 8, 8), Prompts(points=torch.tensor([[[100.0, 37.0]]]), labels=torch.tensor([[1]]))
    exact, _ = backbone.network._embedded(prompts, 1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = backbone.decode(embedding, prompts).logits
    assert torch.isfinite(logits).all()
    seen = []
    handle = backbone.network.prompt_encoder.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.autocast("cpu", torch.bfloat16):
        backbone.decode(embedding, prompts)
    handle.remove()
    assert torch.equal(seen[0], exact)


@torch.no_grad()
def test_any_cut_gives_the_same_embedding():
    backbone, images = stirred(), torch.randn(1, 3, 128, 128)
    expected = backbone(images)
    for block in range(backbone.num_blocks + 1):
        assert torch.equal(backbone.suffix(backbone.prefix(images, block), block), expected)
    assert backbone.num_blocks == 5
    firsts = {"vision.2.attn.q": 2, "neck.0": 4, "vision": 0, "vision.patch_embed": 0, "decoder.0.self_attn.q": 5}
    assert {target: backbone.first_block({target}) for target in firsts} == firsts


def test_semantic_head_has_a_mask_a_class_and_the_background():
    backbone = Sam("tiny", image_size=64, classes=3)
    backbone.load()
    assert backbone.network(torch.randn(2, 3, 64, 64)).shape == (2, 4, 16, 16)
    counts = {1: 3_777_698, 2: 3_918_019, 3: 4_058_340, 8: 4_759_945, 13: 5_461_550}
    for classes, expected in counts.items():
        decoder = Sam("tiny", image_size=64, classes=classes).network.mask_decoder
        assert sum(parameter.numel() for parameter in decoder.parameters()) == expected


def test_keys_are_those_of_segment_anythings_own_checkpoints():
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        stock = sam_model_registry["vit_b"]()
    network = Sam("vit_b", image_size=1024).network
    assert {key: value.shape for key, value in network.state_dict().items()} == {key: v.shape for key, v in stock.state_dict().items()}


# ---- counts of the papers ----


def test_salt_and_its_baselines_count_as_the_paper_does():
    sites = Sam("vit_b", image_size=512, compat="salt").sites()

    def count(method, targets=SALT_SITES):
        return sum(method.count(site) for site in resolve(targets, sites, method))

    preset = {"*attn*": 760, "*mlp*": 50, "*neck*": 250}
    assert count(SALT(ranks=preset, tail_rank=4)) == 179_368
    assert count(SALT(ranks=preset, tail_rank=256)) == 8_967_112
    assert count(SALT(ratio=1.0)) == 74_752  # S-SAM: scale and shift of every singular value
    assert count(LoRA(rank=4)) == 604_160
    assert count(LoRA(rank=256)) == 38_666_240
    text_affine = 512 * 256 + 256 + 2 * 256
    assert count(Full(), ["vision.*.norm*", "decoder.*norm*", "vision.pos_embed"]) + text_affine == 959_744
    whole = sum(parameter.numel() for parameter in Sam("vit_b", image_size=512, compat="salt").network.parameters()) + 512
    clip = 151_277_313
    for method, percent in ((SALT(ranks=preset, tail_rank=256), 3.9), (SALT(ranks=preset, tail_rank=4), 0.47), (LoRA(rank=256), 14.08)):
        own = count(method)
        assert 100 * (own + 959_744) / (whole + clip + text_affine + own) == pytest.approx(percent, abs=0.05)


def test_samed_counts_as_its_report_does():
    sites = Sam("vit_b", image_size=512, classes=8).sites()
    method = LoRA(rank=4)
    adapters = sum(method.count(site) for site in resolve("qv", sites, method))
    whole = Full()
    rest = sum(whole.count(site) for site in resolve(["prompt.*", "decoder.*"], sites, whole))
    assert adapters == 147_456 and adapters + rest == 4_913_621


# ---- checkpoints ----


def state(size: int = 128, **options) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in stirred(size, **options).network.state_dict().items()}


@pytest.mark.parametrize("form", ["plain.pth", "plain.safetensors", "medsam.pth", "ddp.pth"])
def test_sams_file_loads_in_every_wrapping(form, tmp_path):
    from safetensors.torch import save_file

    given, path = state(), tmp_path / form
    wrapped = {"medsam.pth": {"model": given, "epoch": 3}, "ddp.pth": {f"module.{key}": value for key, value in given.items()}}
    save_file(given, path) if path.suffix == ".safetensors" else torch.save(wrapped.get(form, given), path)
    backbone = Sam("tiny", image_size=128, checkpoint=str(path))
    backbone.load()
    loaded = backbone.network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in given.items())


def test_another_image_size_resizes_the_position_tables_alone(tmp_path, capsys):
    given = state(128)
    torch.save(given, tmp_path / "sam.pth")
    backbone = Sam("tiny", image_size=96, checkpoint=str(tmp_path / "sam.pth"))
    backbone.load()
    loaded = backbone.network.state_dict()
    resized = {key for key in given if loaded[key].shape != given[key].shape}
    whole = {f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in (1, 3) for axis in "hw"}
    assert resized == {"image_encoder.pos_embed", *whole}
    assert all(torch.equal(loaded[key], given[key]) for key in given.keys() - resized)
    constant = {key: torch.full_like(value, 0.7) if key in resized else value for key, value in given.items()}
    torch.save(constant, tmp_path / "constant.pth")
    backbone = Sam("tiny", image_size=96, checkpoint=str(tmp_path / "constant.pth"))
    backbone.load()
    for key in resized:
        torch.testing.assert_close(backbone.network.state_dict()[key], torch.full_like(loaded[key], 0.7))


def test_a_semantic_head_starts_fresh_and_the_rest_is_loaded(tmp_path):
    given = state()
    torch.save(given, tmp_path / "sam.pth")
    backbone = Sam("tiny", image_size=128, classes=5, checkpoint=str(tmp_path / "sam.pth"))
    backbone.load()
    loaded = backbone.network.state_dict()
    same = [key for key in given if key in loaded and loaded[key].shape == given[key].shape]
    kept = [key for key in same if torch.equal(loaded[key], given[key])]
    assert "mask_decoder.output_upscaling.0.weight" in kept and "image_encoder.pos_embed" in kept
    assert "mask_decoder.mask_tokens.weight" not in kept and loaded["mask_decoder.mask_tokens.weight"].shape == (6, 256)


def test_salts_network_takes_no_relative_positions_from_the_file(tmp_path):
    torch.save(state(), tmp_path / "sam.pth")
    backbone = Sam("tiny", image_size=64, compat="salt", checkpoint=str(tmp_path / "sam.pth"))
    backbone.load()
    assert not [key for key in backbone.network.state_dict() if "rel_pos" in key]
    pooled = nn.functional.adaptive_avg_pool2d(state()["image_encoder.pos_embed"].permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1)
    assert backbone.network.image_encoder.pos_embed.shape == pooled.shape
    # the decoder sees no positions: moving everything by whole patches moves the masks
    backbone.eval()
    embedding = torch.randn(1, 256, 4, 4)
    with torch.no_grad():
        here, there = (backbone.decode(each).logits for each in (embedding, embedding.roll(1, -1)))
    torch.testing.assert_close(here.roll(4, -1), there, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"image_encoder.pos_embed": torch.zeros(1)}, "holds no mask_decoder"),
        ([1, 2], "does not hold a dictionary of tensors"),
        ({"mask_decoder.iou_token.weight": torch.zeros(1, 256)}, "is missing"),
        (None, "cannot be read as a checkpoint"),
    ],
)
def test_what_is_no_sam_checkpoint_is_told_in_one_line(content, message, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(b"no checkpoint") if content is None else torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        Sam("tiny", image_size=128, checkpoint=str(path)).load()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_another_sam_model_is_told_by_its_shape(tmp_path):
    given = state()
    given["image_encoder.blocks.0.attn.qkv.weight"] = torch.zeros(300, 100)
    torch.save(given, tmp_path / "sam.pth")
    with pytest.raises(UserError, match=r"qkv.weight has shape \(300, 100\), expected \(192, 64\)"):
        Sam("tiny", image_size=128, checkpoint=str(tmp_path / "sam.pth")).load()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "vit_x"}, "vit_x"),
        ({"image_size": 100}, "not a multiple of 16"),
        ({"classes": 0}, "at least 1"),
        ({"levels": [1]}, "levels is for timm encoders"),
        ({"checkpoint": "/nowhere/sam.pth"}, "does not exist"),
        ({"name": "offline:effnet_lite0", "image_size": 64, "levels": [9]}, "from 0 to 4"),
    ],
)
def test_impossible_arguments(options, message):
    with pytest.raises(UserError, match=message):
        Sam(**{"name": "tiny", "image_size": 64, **options})


# ---- adapters on it ----


@pytest.mark.parametrize("name", ["lora", "salt", "dora", "bitfit", "full"])
def test_methods_keep_their_contract_on_sam(name):
    backbone = stirred(64)
    images = torch.randn(2, 3, 64, 64)
    method = find_method(name)
    small = method(**{**({"rank": 1} if name in ("lora", "dora") else {}), **method.tiny})
    targets = ["vision.0.attn.{q,v}", "vision.1.mlp.*", "neck.2", "decoder.0.token_to_image.q", "vision.0.norm1"]
    checks = run_contract(backbone.network, backbone.sites(), small, lambda network: network(images), targets)
    assert [check.name for check in checks] == list(CHECKS)
    assert not [(check.name, check.detail) for check in checks if not check.passed]


def test_every_tensor_of_sam_can_be_trained_and_acts():
    """Tokens and tables that a parent module reads without calling their owner, among them."""
    backbone = stirred(64)
    prompts = Prompts(points=torch.tensor([[[10.0, 20.0], [30.0, 5.0], [0.0, 0.0]]]), labels=torch.tensor([[1, 0, -1]]))
    several = (prompts, Prompts(boxes=torch.tensor([[3.0, 4.0, 40.0, 50.0]])), Prompts(masks=torch.randn(1, 1, *backbone.mask_size)))
    adapters = attach(backbone.network, Full(), "all", sites=backbone.sites())
    embedding = backbone(torch.randn(1, 3, 64, 64))
    total = 0
    for each in (*several, Prompts()):
        masks = backbone.decode(embedding, each)
        total = total + masks.logits.square().sum() + masks.quality.square().sum()
    total.backward()
    without = [name for name, parameter in adapters.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    detach(backbone.network)
    spare = ("hypernetwork/1", "hypernetwork/2", "hypernetwork/3")  # masks 1 to 3 are not asked for
    keys_bias = "/k/bias"  # adds the same to every score of a query: softmax ignores it
    assert not [name for name in without if not any(each in name for each in spare) and keys_bias not in name]


def test_a_timm_encoder_goes_through_sams_neck_and_decoder():
    backbone = Sam("vit_tiny_patch16_224", image_size=64, levels=[5, 11])
    assert backbone.mask_size == (16, 16) and backbone.levels == [5, 11]
    assert backbone.first_block({"vision.3.attn.q"}) == 0 and backbone.first_block({"neck.0"}) == 1
    names = [site.name for site in backbone.sites()]
    assert "vision.3.attn.q" in names and "neck.0" in names and "decoder.0.self_attn.q" in names
    channels = {site.name: site.shape for site in backbone.sites()}["neck.0"][1]
    assert channels == 2 * 192
    convolutional = Sam("resnet18", image_size=64)
    assert convolutional.mask_size == (32, 32)  # the finest level has stride 8
