"""Evaluation equals CLIP's own preprocessing; random crops are distributed as torchvision's and depend on their stream only."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from vision_peft.backbones.base import Preprocess
from vision_peft.data.transforms import CropTransform, EvalTransform, FlipTransform, train_transform


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_evaluation_equals_open_clip(image):
    open_clip = pytest.importorskip("open_clip")
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    reference = open_clip.image_transform(16, is_train=False, mean=mean, std=std, interpolation="bicubic", resize_mode="shortest")
    ours = EvalTransform(Preprocess(16, mean, std))
    torch.testing.assert_close(ours.finish(ours.prepare(image), random.Random(0)), reference(image))


def test_crop_ratio_and_interpolation_are_the_preprocess_s(image):
    ours = EvalTransform(Preprocess(14, (0.5,) * 3, (0.5,) * 3, "bilinear", crop=0.875))
    expected = v2.functional.pil_to_tensor(v2.functional.center_crop(image.resize((24, 16), Image.Resampling.BILINEAR), [14, 14]))
    assert torch.equal(ours.prepare(image), expected)


def test_random_boxes_are_distributed_as_torchvision_s(preprocess):
    torch.manual_seed(0)
    height, width, count = 120, 160, 4000
    reference = v2.RandomResizedCrop(16, scale=(0.08, 1))
    probe = torch.empty(3, height, width)
    boxes = [reference.make_params([probe]) for _ in range(count)]
    theirs = np.array([[box[key] for key in ("top", "left", "height", "width")] for box in boxes])
    stream, crop = random.Random(0), CropTransform(preprocess)
    ours = np.array([crop._box(height, width, stream) for _ in range(count)])
    error = 5 * theirs.std(0) * math.sqrt(2 / count)  # five standard errors of the difference of two means
    assert (abs(ours.mean(0) - theirs.mean(0)) < error).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.1)


@pytest.mark.parametrize("shape", [(10, 1000), (1000, 10)])
def test_long_thin_pictures_fall_back_to_torchvision_s_centre_box(preprocess, shape):
    crop = CropTransform(preprocess, min_scale=1.0)  # the whole area never fits at an allowed ratio
    reference = v2.RandomResizedCrop(16, scale=(1.0, 1.0)).make_params([torch.empty(3, *shape)])
    assert crop._box(*shape, random.Random(0)) == tuple(reference[key] for key in ("top", "left", "height", "width"))


def test_same_stream_same_pixels_and_the_cached_ones_stay(preprocess, image):
    crop = CropTransform(preprocess)
    kept = crop.prepare(image)
    before = kept.clone()
    first = crop.finish(kept, random.Random("1/0/5"))
    torch.rand(3), random.random()  # global streams do not matter
    assert torch.equal(crop.finish(kept, random.Random("1/0/5")), first) and torch.equal(kept, before)
    assert not torch.equal(crop.finish(kept, random.Random("1/1/5")), first)
    assert first.shape == (3, 16, 16) and first.dtype == torch.float32


def test_shrink_bounds_what_is_kept(preprocess, image):
    assert CropTransform(preprocess, shrink=1.5).prepare(image).shape == (3, 24, 36)
    assert CropTransform(preprocess, shrink=None).prepare(image).shape == (3, 40, 60)
    assert CropTransform(preprocess, shrink=3).prepare(image).shape == (3, 40, 60)  # never enlarged


def test_flip_is_evaluation_mirrored_half_of_the_time(preprocess, image):
    flip, plain = FlipTransform(preprocess), EvalTransform(preprocess)
    straight = plain.finish(plain.prepare(image), random.Random(0))
    results = [flip.finish(flip.prepare(image), random.Random(number)) for number in range(200)]
    same = [torch.equal(result, straight) for result in results]
    assert 70 < sum(same) < 130
    assert torch.equal(results[same.index(False)], straight.flip(-1))


def test_names(preprocess):
    kinds = {name: train_transform(name, preprocess, 0.08, 1.5) for name in ("clip_lora", "flip", "none")}
    assert {name: kind.random for name, kind in kinds.items()} == {"clip_lora": True, "flip": True, "none": False}
