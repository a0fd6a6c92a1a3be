"""Pictures with masks: formats, what masks may hold, splits, patches, and one clear line for what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vision_peft.backbones.base import Preprocess
from vision_peft.data.mask_augment import MaskAugment
from vision_peft.data.mask_presets import PRESETS
from vision_peft.data.pixels import load_labels, load_pixels
from vision_peft.data.sampler import Draw
from vision_peft.data.segmentation_images import SegmentationImages
from vision_peft.errors import UserError

GREY = Preprocess(32, (0.0,) * 3, (1.0,) * 3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A set of 8 pictures 24 x 40 with a bright rectangle each, its masks 0 / 255, fields of view, and a CSV."""
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path))
    rows = ["image,mask,fov,split"]
    for i, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2):
        rng = np.random.default_rng(i)
        picture = rng.integers(0, 90, (24, 40, 3), dtype=np.uint8)
        mask, fov = np.zeros((24, 40), np.uint8), np.zeros((24, 40), np.uint8)
        mask[4 + i : 14 + i, 10:25] = 255
        picture[mask > 0] += 120
        fov[:, 4:36] = 255
        for kind, values in (("images", picture), ("masks", mask), ("fov", fov)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / kind / f"{i}.png")
        rows.append(f"images/{i}.png,masks/{i}.png,fov/{i}.png,{split}")
    (tmp_path / "split.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def module(preprocess: Preprocess = GREY, **options) -> SegmentationImages:
    data = SegmentationImages("split.csv", **{"augment": "none", **options})
    data.preprocess = preprocess
    return data


def test_items_are_squares_with_masks_and_valid_pixels(folder):
    data = module()
    data.setup("fit")
    item = data.train_dataset[0]
    assert item["image"].shape == (3, 32, 32) and item["target"].shape == item["valid"].shape == (32, 32)
    assert item["target"].dtype == torch.int64 and set(item["target"].unique().tolist()) == {0, 1}
    inside = item["image"][:, item["target"] == 1].mean() - item["image"][:, (item["target"] == 0) & item["valid"]].mean()
    assert inside > 0.3, "picture and mask do not lie on each other"
    assert not item["valid"][20:].any(), "padding counts"
    [first, *_] = next(iter(data.val_dataloader()))
    assert first.target.shape == (24, 40) and first.valid[:, 4:36].all() and not first.valid[:, :4].any()


def test_patches_are_cut_at_the_pictures_own_scale(folder):
    data = module(patch=12)
    data.setup("fit")
    items = [data.train_dataset[i] for i in range(4)]
    assert all(item["image"].shape == (3, 32, 32) and item["target"].shape == (12, 12) for item in items)
    [case] = next(iter(data.val_dataloader()))
    assert case.image.shape == (3, 24, 40)
    larger = module(patch=64)  # than the pictures
    larger.setup("fit")
    item = larger.train_dataset[0]
    assert item["target"].shape == (64, 64) and not item["valid"][24:].any()


@pytest.mark.parametrize("name", ["default", "flip", "salt", "samed"])
def test_augmentation_moves_picture_and_mask_together(folder, name):
    data = module(augment=name, repeats=6)
    data.setup("fit")
    for i in range(24):
        item = data.train_dataset[Draw(i, 3)]
        target, valid = item["target"] == 1, item["valid"]
        if target.sum() < 30:
            continue
        core = torch.nn.functional.avg_pool2d(target[None].float(), 3, 1, 1)[0] > 0.99
        assert item["image"][:, core].mean() > item["image"][:, valid & ~target].mean() + 0.15
    a, b = data.train_dataset[Draw(3, 1)], data.train_dataset[Draw(3, 1)]
    assert torch.equal(a["image"], b["image"]) and a["draw"] == b["draw"]
    assert not torch.equal(a["image"], data.train_dataset[Draw(3, 2)]["image"])


def test_rotation_brings_in_pixels_that_do_not_count():
    image, target, valid = torch.ones(3, 32, 32), torch.ones(1, 32, 32, dtype=torch.int64), torch.ones(1, 32, 32, dtype=torch.bool)
    augment = MaskAugment("salt")
    results = [augment(image, target, valid, draw) for draw in range(20)]
    turned = [each for each in results if not each[2].all()]
    assert len(turned) > 4
    for _, target, valid in turned:
        assert torch.equal(target.bool(), valid)


def test_a_val_part_is_held_out_by_the_seed(folder):
    text = (folder / "split.csv").read_text().replace(",val", ",train")
    (folder / "split.csv").write_text(text)
    parts = [module(val_share=0.34, seed=seed).splits for seed in (1, 1, 2)]
    assert [len(each["val"]) for each in parts] == [2, 2, 2] and len(parts[0]["train"]) == 4
    assert parts[0] == parts[1] and parts[0]["val"] != parts[2]["val"]
    assert not set(parts[0]["val"]) & set(parts[0]["train"])
    assert len(module(train_images=2).splits["train"]) == 2


def test_multiclass_numbers_become_indices(folder):
    for i in range(8):
        values = np.array(Image.open(folder / "masks" / f"{i}.png"))
        values[:, :14] = np.where(values[:, :14] > 0, 40, 0)
        Image.fromarray(values).save(folder / "masks" / f"{i}.png")
    data = module(kind="multiclass", classes={255: "bright", 40: "left"})
    data.setup("fit")
    assert set(data.train_dataset[0]["target"].unique().tolist()) == {0, 1, 2} and data.class_names == ["bright", "left"]
    one = module(kind="multiclass", classes={255: "bright", 40: "left"}, one=True)
    one.setup("fit")
    assert len(one.val_dataloader().dataset) == 4 and set(one.train_dataset[0]["target"].unique().tolist()) == {0, 1}


def test_instances_are_one_foreground_or_one_at_a_time(folder):
    for i in range(8):
        values = np.zeros((24, 40), np.uint16)
        values[2:8, 2:8], values[10:20, 20:30] = 1, 500
        Image.fromarray(values).save(folder / "masks" / f"{i}.png")
    together, single = module(kind="instance"), module(kind="instance", one=True)
    for data in (together, single):
        data.setup("fit")
    assert together.train_dataset[0]["target"].sum() > single.train_dataset[0]["target"].sum() > 0
    assert [case.object for case in next(iter(single.val_dataloader()))] == [1, 500, 1, 500]


# ---- formats ----


def test_sixteen_bits_keep_their_depth_and_alpha_is_laid_on_white(tmp_path):
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    values = load_pixels(tmp_path / "deep.png").values
    assert values.shape == (32, 32, 3) and np.allclose(values[..., 0], deep / 65535)
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    assert np.allclose(load_pixels(tmp_path / "deep.tif").values[..., 0], deep / 65535)
    clear = np.zeros((4, 4, 4), np.uint8)
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    assert (load_pixels(tmp_path / "clear.png").values == 1).all()


def test_nifti_slices_and_dicom_keep_orientation_units_and_spacing(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    values = np.arange(5 * 7 * 3, dtype=np.float32).reshape(5, 7, 3)  # x, y, z
    nibabel.save(nibabel.Nifti1Image(values, np.diag([0.5, 2.0, 3.0, 1.0])), tmp_path / "volume.nii.gz")
    found = load_pixels(tmp_path / "volume.nii.gz", 1)
    assert found.measured and found.values.shape == (7, 5, 3) and found.spacing == (2.0, 0.5)
    assert np.array_equal(found.values[..., 0], values[:, :, 1].T)
    assert load_labels(tmp_path / "volume.nii.gz", 2)[6, 4] == values[4, 6, 2]
    for index, message in ((None, "is a volume of 3 slices"), (3, "has no slice 3")):
        with pytest.raises(UserError, match=message):
            load_pixels(tmp_path / "volume.nii.gz", index)


def test_dicom_is_read_in_its_own_units(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(tmp_path / "slice.dcm"), {}, file_meta=meta, preamble=b"\0" * 128)
    stored = np.arange(6 * 8, dtype=np.int16).reshape(6, 8)
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, "CT"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 6, 8, 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 1
    data.RescaleSlope, data.RescaleIntercept = 2, -100
    data.PixelSpacing = [0.5, 0.25]
    data.PixelData = stored.tobytes()
    data.save_as(tmp_path / "slice.dcm", enforce_file_format=True)
    found = load_pixels(tmp_path / "slice.dcm")
    assert found.measured and np.array_equal(found.values[..., 0], 2 * stored - 100)
    assert pydicom.__version__


def test_presets_name_what_they_do(folder):
    assert PRESETS["samed"].window == (75.0, 400.0)  # -125 to 275 Hounsfield units
    data = module(preset="medsam", augment="none")
    data.setup("fit")
    assert data.geometry == "squash" and data.train_dataset[0]["image"].max() <= 1
    windowed = module(preset="samed", augment="none")
    with pytest.raises(UserError, match=r"data.intensity: window counts in the scanner's units"):
        windowed.setup("fit")


# ---- what is wrong with a set ----


def bad(folder, change, message, **options):
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        module(**options).setup("fit")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_mask_of_another_size(folder):
    said = bad(folder, lambda f: Image.new("L", (40, 23)).save(f / "masks/2.png"), "is 40 x 23 pixels, but its picture 2.png is 40 x 24")
    assert "masks/2.png" in said


def test_a_binary_mask_with_more_numbers(folder):
    values = np.tile(np.arange(40, dtype=np.uint8), (24, 1))
    bad(folder, lambda f: Image.fromarray(values).save(f / "masks/1.png"), r"masks/1.png: holds 0, 1, .*\(40 numbers\); a binary mask")


def test_a_number_without_a_class(folder):
    said = bad(folder, lambda f: None, "holds 255, for which data.classes has no name", kind="multiclass", classes={1: "a", 2: "b"})
    assert "(it has 1, 2)" in said


def test_a_colour_mask(folder):
    picture = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    bad(folder, lambda f: Image.fromarray(picture).save(f / "masks/0.png"), "masks/0.png: is a colour picture")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("masks/1.png", "", "line 3: mask is missing"),
        ("masks/1.png", "masks/none.png", "line 3: mask .*none.png does not exist"),
        ("images/1.png", "images/0.png", "line 3: images/0.png is listed twice"),
        ("fov/1.png,train", "fov/1.png,training", "unknown split 'training'"),
        ("image,mask", "image,masks", "no column 'mask'"),
    ],
)
def test_a_wrong_row(folder, old, new, message):
    text = (folder / "split.csv").read_text()
    (folder / "split.csv").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        module()


def test_an_empty_mask_is_a_case_like_others(folder):
    Image.new("L", (40, 24)).save(folder / "masks/0.png")
    data = module(one=True)
    data.setup("fit")
    assert not data.train_dataset[0]["target"].any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "multiclass"}, "data.classes"),
        ({"patch": 0}, "data.patch"),
        ({"overlap": 1.0}, "data.overlap"),
        ({"columns": {"masc": "x"}}, "unknown role 'masc'"),
        ({"train_images": 9}, "data.train_images: is 9"),
    ],
)
def test_impossible_options(folder, options, message):
    with pytest.raises(UserError, match=message):
        module(**options)
