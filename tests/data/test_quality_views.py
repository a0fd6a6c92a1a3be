"""Pairs of crops for the quality-aware encoder: overlap, half-swap, scales, draws; and the pictures that are fit for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vision_peft.data.pristine_images import PristineImages
from vision_peft.data.quality_views import QualityViews, half_swap
from vision_peft.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_offsets_of_the_papers_patch():
    views, draw = QualityViews(160), generator()
    found = [views.offsets(draw) for _ in range(3000)]
    shares = [(160 - y) * (160 - x) / 160**2 for y, x in found]
    assert min(shares) >= 0.10 and max(shares) <= 0.30
    assert {y for y, _ in found} == set(range(112, 144))
    assert {x for y, x in found if y == 143} == set(range(10))
    assert np.mean(shares) == pytest.approx(0.153, abs=0.005)  # small overlaps are favoured


@pytest.mark.parametrize("patch", [8, 31, 64, 96])
def test_offsets_of_other_patches_stay_in_range(patch):
    views, draw = QualityViews(patch), generator()
    shares = [(patch - y) * (patch - x) / patch**2 for y, x in (views.offsets(draw) for _ in range(500))]
    slack = 2 / patch  # whole pixels
    assert min(shares) >= 0.10 - 1e-9 and max(shares) <= 0.30 + slack


def test_crops_are_of_one_place_in_all_versions_and_overlap_as_drawn():
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(80.0), indexing="ij")
    stack = torch.stack([rows, columns, rows])[None].repeat(3, 1, 1, 1)
    first, second = QualityViews(16).crops(stack, generator(1))
    assert first.shape == second.shape == (3, 3, 16, 16) and torch.equal(first[0], first[2])
    y, x = (second[0, :2, 0, 0] - first[0, :2, 0, 0]).int().tolist()
    assert (y, x) == QualityViews(16).offsets(generator(1))


def test_half_swap_twice_gives_the_input():
    a, b = torch.rand(5, 3, 4, 4), torch.rand(5, 3, 4, 4)
    swapped = torch.tensor([True, True, False, False, False])
    query, key = half_swap(a, b, swapped)
    assert torch.equal(query[:2], b[:2]) and torch.equal(key[:2], a[:2]) and torch.equal(query[2:], a[2:])
    again = half_swap(query, key, swapped)
    assert torch.equal(again[0], a) and torch.equal(again[1], b)


def test_a_picture_becomes_24_pairs_whose_swaps_are_opposite_at_the_two_scales():
    # The picture says where a pixel is: red the row, green the column.
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 100), torch.linspace(0, 1, 100), indexing="ij")
    image = torch.stack([rows, columns, rows])
    views = QualityViews(16, distortions=11)
    query, key = views(image, generator())
    assert query.shape == key.shape == (24, 3, 16, 16)
    flat = QualityViews(16, distortions=1, kinds=("mean_shift",))
    for seed in range(5):
        query, key = flat(image, generator(seed))  # versions: the picture, and one; the first is swapped at full size, the second at half
        further_down = query[:, 0, 0, 0] > key[:, 0, 0, 0] + 0.05
        shifts = (query - key).abs().amax((1, 2, 3)) > 0
        assert shifts.all() and further_down.tolist() == [True, False, False, True]


def test_the_draws_come_from_the_generator_alone():
    image = torch.rand(3, 120, 120, generator=generator())
    before = torch.random.get_rng_state()
    first, again, other = (QualityViews(16)(image, generator(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first[:12].min() >= 0 and first[:12].max() <= 1


def test_kinds_of_a_picture_are_all_different():
    views = QualityViews(16, distortions=26)
    stack = views.distorted(torch.rand(3, 64, 64, generator=generator()), generator())
    assert stack.shape == (27, 3, 64, 64)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kinds": ["gaussian_blurr"]}, "data.kinds: unknown distortion 'gaussian_blurr'; did you mean gaussian_blur"),
        ({"kinds": ["jpeg"]}, "data.distortions: is 11, must be from 1 to the 1 kinds"),
        ({"overlap": (0.3, 0.1)}, "data.overlap"),
        ({"patch": 4}, "data.patch: must be at least 8"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"images": "nowhere"}, "data.images: .*nowhere does not exist"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(UserError, match=message):
        PristineImages(**{"images": "p", **options})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path))
    (tmp_path / "p").mkdir()
    for i in range(6):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(tmp_path / "p" / f"{i}.png")
    return tmp_path


def data(**options) -> PristineImages:
    found = PristineImages("p", patch=16, distortions=2, batch_size=2, **options)
    found.setup("fit")
    return found


def test_batches_and_the_held_out_part(folder):
    batch = next(iter(data().train_dataloader()))
    assert batch["query"].shape == batch["key"].shape == (2, 6, 3, 16, 16)
    assert len(data().train_dataloader().dataset) == 5 and len(data().val_dataloader().dataset) == 1
    rows = "\n".join(f"p/{i}.png,{split}" for i, split in enumerate(["train", "val", "val", "test", "train", "train"]))
    (folder / "split.csv").write_text(f"path,split\n{rows}\n")
    listed = PristineImages("split.csv")
    assert {split: [path.name for path in paths] for split, paths in listed.splits.items()} == {
        "train": ["0.png", "4.png", "5.png"],
        "val": ["1.png", "2.png"],
    }


def test_workers_and_undecoded_pictures_change_nothing(folder):
    first = torch.cat([batch["query"] for batch in data().train_dataloader()])
    assert torch.equal(first, torch.cat([batch["query"] for batch in data(num_workers=1).train_dataloader()]))
    assert torch.equal(first, torch.cat([batch["query"] for batch in data(cache_images=False).train_dataloader()]))


def test_small_pictures_are_left_out_and_told(folder):
    Image.new("RGB", (60, 200)).save(folder / "p" / "0.png")
    with pytest.warns(UserWarning, match=r"1 of \d (train|val) pictures are smaller than 60 pixels"):
        found = PristineImages("p", patch=16, distortions=2, val_share=0.3)
        assert found.views.smallest_side == 60
        Image.new("RGB", (59, 200)).save(folder / "p" / "0.png")
        found.setup("fit")
    with pytest.raises(UserError, match=r"choose a smaller data\.patch"):
        PristineImages("p", patch=64).setup("fit")


@pytest.mark.parametrize("kind", ["L", "RGBA", "I;16"])
def test_grey_alpha_and_deep_pictures_pass(folder, kind):
    values = np.random.default_rng(0).integers(0, 255, (80, 90), dtype=np.uint8)
    picture = Image.fromarray(values.astype(np.uint16) * 257) if kind == "I;16" else Image.fromarray(values).convert(kind)
    for i in range(6):
        picture.save(folder / "p" / f"{i}.png")
    assert next(iter(data().train_dataloader()))["query"].shape == (2, 6, 3, 16, 16)


def test_a_broken_picture_is_named(folder):
    (folder / "p" / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"3\.png: cannot be decoded"):
        data()
