"""Segmentation from the command line on tiny networks: it learns, resumes, tests, predicts, and says what is wrong."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vision_peft.adapters.lora import LoRA
from vision_peft.backbones import Sam
from vision_peft.cli import main
from vision_peft.commands.run import RunCLI, make_cli
from vision_peft.engine.install import installed
from vision_peft.engine.store import load_adapter, read_config

CONFIG = {
    "seed_everything": 1,
    "model": {
        "class_path": "PromptableSegmentation",
        "init_args": {
            "backbone": {"class_path": "vision_peft.backbones.Sam", "init_args": {"name": "tiny", "image_size": 64}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}},
        },
    },
    "data": {"class_path": "SegmentationImages", "init_args": {"file": "split.csv", "augment": "flip", "batch_size": 4}},
    "adapter": {
        "method": {"class_path": "LoRA", "init_args": {"rank": 2}},
        "targets": "qv",
        "train": ["neck.*", "decoder.*", "prompt.no_mask"],
    },
    "trainer": {"max_steps": 4, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Discs on noise, 40 x 56, of which the mask is known."""
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path))
    rows = ["image,mask,split"]
    rows_, columns = np.mgrid[:40, :56]
    for i, split in enumerate(["train"] * 8 + ["val"] * 2 + ["test"] * 3):
        rng = np.random.default_rng(i)
        disc = (rows_ - rng.integers(12, 28)) ** 2 + (columns - rng.integers(14, 42)) ** 2 < 81
        picture = rng.integers(0, 90, (40, 56, 3), dtype=np.uint8)
        picture[disc] += 140
        for kind, values in (("images", picture), ("masks", disc.astype(np.uint8))):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / kind / f"{i}.png")
        rows.append(f"images/{i}.png,masks/{i}.png,{split}")
    (tmp_path / "split.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def words(folder: Path, *more: str) -> list[str]:
    return ["--config", str(folder / "config.yaml"), *more]


def fit(folder: Path, name: str, *more: str) -> RunCLI:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_cli("fit", words(folder, "--run", str(folder / name), *more), run=True)


def test_it_learns_and_its_test_writes_cases_and_pictures(folder, capsys):
    fit(folder, "run", "--trainer.max_steps", "40")
    last = str(folder / "run/checkpoints/last.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["test", *words(folder, "--run", str(folder / "run"), "--ckpt_path", last)]) == 0
    assert "test/dice_image" in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "run/test/cases.csv").open()))
    assert [row["picture"] for row in rows] == ["10", "11", "12"]
    dice = np.mean([float(row["dice_image"]) for row in rows])
    everywhere = np.mean([2 * m / (m + 1) for m in (np.array(Image.open(folder / f"masks/{i}.png")).mean() for i in (10, 11, 12))])
    assert dice > everywhere + 0.4, "no better than calling everything the target"
    assert Image.open(folder / "run/test/overlays.png").size[0] > 1000
    stored = read_config(folder / "run/adapter")
    assert stored["beside"]["trained"]["method"]["name"] == "full" and 0 < stored["threshold"] < 1


def test_the_adapter_folder_alone_gives_the_trained_network(folder):
    cli = fit(folder, "run")
    backbone = Sam("tiny", image_size=64)
    backbone.load()
    load_adapter(backbone.network, folder / "run/adapter", sites=backbone.sites(), resized=backbone.resized)
    images = torch.randn(2, 3, 64, 64)
    backbone.eval(), cli.model.eval()
    with torch.no_grad():
        assert torch.equal(backbone.network(images), cli.model.backbone.network(images))
    assert set(installed(backbone.network)) == {"default", "trained"}


def test_cached_embeddings_train_the_same_decoder(folder):
    """With a frozen encoder and pictures that do not change, the encoder runs once; the result is that of running it every step."""
    frozen = ["--adapter.method", "null", "--data.augment", "none", "--adapter.train", "[decoder.*]"]
    cached, plain = (fit(folder, name, *frozen, "--model.cache", name) for name in ("memory", "off"))
    for name, part in plain.model.parts.items():
        for key, value in part.state_dict().items():
            torch.testing.assert_close(cached.model.parts[name].state_dict()[key], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "prompt",
    ["PointPrompt", "BoxPrompt", "MaskPrompt", "{class_path: PointPrompt, init_args: {positive: 2, negative: 1}}", "ClassText"],
)
def test_every_prompt_runs(folder, prompt):
    asks = [] if prompt == "ClassText" else ["--data.one", "true"]
    cli = fit(folder, "run", "--model.prompt", prompt, "--adapter.train", "[decoder.*, prompt.*]", *asks)
    assert cli.trainer.global_step == 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)[0]
    assert 0 <= scores["test/dice_image"] <= 1
    assert ("prompt" in cli.model.parts) == (prompt == "ClassText")


@pytest.mark.parametrize("method", ["{class_path: EVA, init_args: {rank: 2}}", "{class_path: LoRASB, init_args: {rank: 2}}"])
def test_methods_that_look_at_the_data_first_run(folder, method):
    assert fit(folder, "run", "--adapter.method", method, "--adapter.targets", "attn").trainer.global_step == 4


def test_a_semantic_head_scores_each_class(folder):
    for i in range(13):
        values = np.array(Image.open(folder / f"masks/{i}.png"))
        values[:, 28:] *= 2
        Image.fromarray(values).save(folder / f"masks/{i}.png")
    several = ["--data.kind", "multiclass", "--data.classes", "{1: left, 2: right}", "--model.backbone.classes", "2"]
    cli = fit(folder, "run", *several)
    scores = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)[0]
    assert {"test/dice_image/left", "test/dice_image/right"} <= scores.keys() and "test/auc" not in scores


def test_a_unet_from_scratch_runs_on_patches(folder):
    unet = ["--model.backbone", "{class_path: vision_peft.backbones.UNet, init_args: {image_size: 32, channels: [4, 8, 16]}}"]
    cli = fit(folder, "run", *unet, "--adapter.method", "null", "--adapter.train", "['*']", "--data.patch", "32")
    assert cli.adapter.adapters.num_trainable() == sum(p.numel() for p in cli.model.backbone.network.parameters())


def test_predictions_have_the_pictures_size_and_format(folder):
    fit(folder, "run")
    (folder / "new/sub").mkdir(parents=True)
    Image.open(folder / "images/11.png").save(folder / "new/a.png")
    Image.open(folder / "images/12.png").resize((71, 33)).save(folder / "new/sub/b.tif")
    Image.open(folder / "images/12.png").save(folder / "new/c.jpg")
    last = str(folder / "run/checkpoints/last.ckpt")
    more = ["--run", str(folder / "run"), "--ckpt_path", last, "--data.predict_folder", "new"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["predict", *words(folder, *more)]) == 0
    found = sorted(path.relative_to(folder / "run/predict/masks").as_posix() for path in (folder / "run/predict/masks").rglob("*.*"))
    assert found == ["a.png", "c.png", "sub/b.tif"]
    mask = Image.open(folder / "run/predict/masks/sub/b.tif")
    assert mask.size == (71, 33) and set(np.unique(mask)) <= {0, 255}


def test_a_volume_is_predicted_as_a_volume(folder):
    nibabel = pytest.importorskip("nibabel")
    fit(folder, "run", "--data.intensity", "minmax")
    (folder / "new").mkdir()
    affine = np.diag([0.7, 0.9, 2.0, 1.0])
    values = np.random.default_rng(0).normal(size=(20, 30, 4)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, affine), folder / "new/scan.nii.gz")
    more = ["--run", str(folder / "run"), "--ckpt_path", str(folder / "run/checkpoints/last.ckpt"), "--data.predict_folder", "new"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["predict", *words(folder, *more, "--data.intensity", "minmax")]) == 0
    mask = nibabel.load(folder / "run/predict/masks/scan.nii.gz")
    assert mask.shape == (20, 30, 4) and np.allclose(mask.affine, affine)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--model.backbone.classes", "3"], "model.backbone.classes: is 3, but the masks hold 1 classes"),
        (["--model.prompt", "PointPrompt", "--data.patch", "32"], "data.patch: windows have no masks to take prompts from"),
        (["--adapter.train", "[decodr.*]"], "adapter.targets: 'decodr.*' matches no layer"),
        (["--adapter.train", "[vision.*]"], "is adapted already"),
        (["--model.threshold", "1.5"], "model.threshold"),
    ],
)
def test_bad_configurations_are_one_line(folder, more, message, capsys):
    assert main(["fit", *words(folder, "--run", str(folder / "run"), *more)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said


def test_lora_on_sams_tensors_is_exported_merged(folder, capsys):
    fit(folder, "run")
    out = folder / "merged.safetensors"
    assert main(["export", str(folder / "run"), "--to", "merged", "--output", str(out)]) == 0
    backbone = Sam("tiny", image_size=64, checkpoint=str(out))
    backbone.load()
    assert main(["export", str(folder / "run"), "--to", "peft", "--output", str(folder / "peft")]) == 2
    assert "trained beside the method" in capsys.readouterr().err
    assert LoRA.low_rank
