"""Every file of configs/: counted, introduced, parsed, and run for two steps where this machine can."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from generators import stable_diffusion, unconditional
from PIL import Image

from vision_peft.cli import main
from vision_peft.commands.run import RunCLI, make_cli
from vision_peft.commands.sequence_file import read_sequence
from vision_peft.commands.trial import nested
from vision_peft.engine.adapter import method_names
from vision_peft.engine.precision import cpu_has_bfloat16
from vision_peft.engine.store import read_config

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = {path.relative_to(CONFIGS).as_posix(): path for path in sorted(CONFIGS.rglob("*.yaml"))}
VIT = str(CONFIGS / "task" / "fewshot_vit.yaml")
METHODS = [name for name in FILES if name.startswith("method/")]
TRAINERS = [name for name in FILES if name.startswith("trainer/")]

SHORT = "--data.source Digits --data.shots 2 --trainer.max_steps 2 --trainer.accelerator cpu --trainer.enable_progress_bar false"
BACKBONE = "--model.backbone.name test_vit --model.backbone.pretrained false --model.backbone.image_size 32"
TINY = f"{BACKBONE} {SHORT}".split()
LAST = ["--adapter.targets", "vision.{3..5}.*"]  # of the six blocks of test_vit
TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2},
}


def kind(name: str) -> str:
    return name.rpartition("/")[0] or Path(name).stem


def run(folder: Path, *words: str) -> RunCLI:
    """Two steps in this process, in the way `vision-peft fit` takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_cli("fit", [*words, "--run", str(folder)], run=True)


def parse(monkeypatch, *words: str) -> dict:
    """The resolved configuration, every key checked against its class; nothing is built."""
    monkeypatch.setattr(RunCLI, "instantiate_classes", lambda self: None)
    return make_cli("fit", list(words), run=False).config["fit"].as_dict()


def finished(cli: RunCLI, folder: Path) -> None:
    assert cli.trainer.global_step == 2
    assert (folder / "config.yaml").is_file()
    assert list((folder / "tensorboard").iterdir())


# ---- what there is ----


def test_how_many_there_are():
    kinds = [kind(name) for name in FILES]
    assert {each: kinds.count(each) for each in set(kinds)} == {
        "quickstart": 1,
        "task": 13,
        "method": len(method_names()) + 2,
        "trainer": 5,
        "set": 14,
        "baseline": 5,
        "sequence": 3,
        "retention": 2,
        "segmentation": 11,
        "recipe": 8,
    }
    assert {Path(name).stem for name in METHODS} == {*method_names(), "none", "probe"}
    assert not list(CONFIGS.rglob("*.yml"))


@pytest.mark.parametrize("name", FILES)
def test_header_says_what_how_and_then_comes_something(name):
    lines = FILES[name].read_text().splitlines()
    header = [line.removeprefix("#").strip() for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]]
    starts = tuple(f"vision-peft {command}" for command in ("fit", "compare", "table", "continual", "data")) + ("torchrun",)
    commands = [i for i, line in enumerate(header) if line.startswith(starts)]
    assert commands, "no command"
    assert len(header[0]) > 20, "the first line should say what the file is for"
    assert not header[0].startswith("vision-peft")
    assert yaml.safe_load(FILES[name].read_text()), "nothing after the header"
    trains = [i for i in commands if not header[i].startswith(("vision-peft data", "vision-peft test"))]
    for i in trains:  # the files a command names exist, its own among them
        named = [path for path in re.findall(r"configs/[\w/]+\.yaml", header[i]) if "NAME" not in path]
        assert f"configs/{name}" in named
        assert all((CONFIGS.parent / path).is_file() for path in named)
    if kind(name) in ("task", "method", "baseline"):
        assert [line for line in header[commands[-1] + 1 :] if len(line) > 20], "no expected result after the command"


# ---- methods, on top of task/fewshot_vit.yaml ----


@pytest.mark.parametrize("name", METHODS)
def test_method_runs(name, tmp_path):
    folder = tmp_path / "run"
    finished(cli := run(folder, "--config", VIT, "--config", str(FILES[name]), *TINY, *LAST), folder)
    if name in ("method/none.yaml", "method/probe.yaml"):
        assert cli.adapter.method is None
        assert not (folder / "adapter").exists()
        return
    stored = read_config(folder / "adapter")
    assert stored["method"]["name"] == Path(name).stem
    given = yaml.safe_load(FILES[name].read_text())["adapter"]["method"].get("init_args", {})
    assert {key: stored["method"]["hyperparameters"][key] for key in given} == given


# ---- tasks and the quickstart ----


def test_fewshot_vit_runs(tmp_path):
    finished(run(tmp_path / "run", "--config", VIT, *TINY, *LAST), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.csv").is_file()
    stored = read_config(tmp_path / "run" / "adapter")
    assert stored["metrics"].keys() >= {"before/accuracy", "after/accuracy", "train/loss"}


def test_fewshot_clip_runs(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_CLIP))
    small = {"model": {"init_args": {"backbone": {"init_args": {"config": str(tmp_path / "tiny.json"), "weights": None}}}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    words = ["--config", str(FILES["task/fewshot_clip.yaml"]), "--config", str(tmp_path / "small.yaml"), *SHORT.split()]
    cli = run(tmp_path / "run", *words)
    finished(cli, tmp_path / "run")
    stored = read_config(tmp_path / "run" / "adapter")
    assert len(stored["sites"]) == 2 * 2 * 3  # q, k, v of two blocks of both towers
    assert stored["method"]["hyperparameters"] == {"rank": 2, "alpha": 1.0, "scaling": "sqrt_rank", "dropout": 0.25}
    [optimizer] = cli.trainer.optimizers
    assert optimizer.param_groups[0]["initial_lr"] == 2e-4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)


def test_quickstart_runs_on_a_tiny_backbone(tmp_path):
    finished(run(tmp_path / "run", "--config", str(FILES["quickstart.yaml"]), *TINY), tmp_path / "run")
    assert read_config(tmp_path / "run" / "adapter")["metrics"].keys() >= {"before/accuracy", "after/accuracy"}


@pytest.mark.slow
def test_quickstart_as_it_stands(tmp_path, capsys):
    """The whole main job, minutes long: fetches DINOv2 ViT-S/14 once, learns the digits. README: 0.79 before, 0.91 after."""
    assert main(["fit", "--config", str(FILES["quickstart.yaml"]), "--run", str(tmp_path / "run")]) == 0
    metrics = read_config(tmp_path / "run" / "adapter")["metrics"]
    assert 0.70 < metrics["before/accuracy"] < 0.85
    assert 0.85 < metrics["after/accuracy"] < 0.97
    assert "run folder:" in capsys.readouterr().out


def test_the_last_checkpoint_is_the_end_of_the_run(tmp_path):
    """What README and the headers hand to `test` and `predict`, also where checkpoint_every (here 50) does not divide the steps."""
    run(tmp_path / "run", "--config", VIT, *TINY, *LAST)
    held = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert held["global_step"] == 2


# ---- baselines, on top of task/fewshot_clip.yaml ----


@pytest.mark.parametrize("name", [name for name in FILES if kind(name) == "baseline"])
def test_baseline_runs(name, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_CLIP))
    small = {"model": {"init_args": {"backbone": {"init_args": {"config": str(tmp_path / "tiny.json"), "weights": None}}}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    steps = yaml.safe_load(FILES[name].read_text()).get("trainer", {}).get("max_steps", 2)
    words = ["--config", str(FILES["task/fewshot_clip.yaml"]), "--config", str(tmp_path / "small.yaml"), "--config", str(FILES[name])]
    cli = run(tmp_path / "run", *words, *SHORT.split(), "--trainer.max_steps", str(steps))
    assert cli.trainer.global_step == steps and cli.adapter.method is None
    assert type(cli.model.head).__name__ == yaml.safe_load(FILES[name].read_text())["model"]["init_args"]["head"]["class_path"]


# ---- sets ----


@pytest.mark.parametrize("name", [name for name in FILES if kind(name) == "set"])
def test_a_set_replaces_source_and_template_of_a_task(name, monkeypatch):
    wanted = yaml.safe_load(FILES[name].read_text())["data"]["init_args"]
    config = parse(monkeypatch, "--config", str(FILES["task/fewshot_clip.yaml"]), "--config", str(FILES[name]))
    data = config["data"]["init_args"]
    assert data["source"]["class_path"].endswith(f".{wanted['source']['class_path']}")
    assert data["source"]["init_args"].items() >= wanted["source"].get("init_args", {}).items()
    assert data["template"] == wanted["template"] == "a photo of a {}."
    assert data["shots"] == 16


# ---- retention ----


@pytest.mark.parametrize("name", [name for name in FILES if kind(name) == "retention"])
def test_retention_names_sets_that_read_as_they_are_called(name, monkeypatch):
    config = parse(monkeypatch, "--config", str(FILES["task/fewshot_clip.yaml"]), "--config", str(FILES[name]))
    [callback] = config["trainer"]["callbacks"]
    assert callback["class_path"].endswith(".ZeroShotRetention")
    for called, data in callback["init_args"]["sets"].items():
        assert called in str(data["init_args"]["source"]["init_args"])
        assert data["init_args"]["template"] == "a photo of a {}."


# ---- segmentation ----


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """Four pictures with masks under the names that the segmentation tasks read."""
    monkeypatch.setenv("VISION_PEFT_DATA", str(tmp_path))
    for name, column in (("drive", "mask"), ("nuclei", "instances")):
        (tmp_path / name).mkdir()
        rows = [f"image,{column},split"]
        for i, split in enumerate(("train", "train", "val", "test")):
            mask = np.zeros((40, 50), np.uint8)
            mask[5:25, 4 + i : 30] = 1
            Image.fromarray(np.full((40, 50, 3), 60 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
            Image.fromarray(mask).save(tmp_path / name / f"{i}_mask.png")
            rows.append(f"{i}.png,{i}_mask.png,{split}")
        (tmp_path / name / "split.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


SEGMENT = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.batch_size", "2"]
SMALL_VIT = ["--model.backbone.name", "vit_small_patch16_224", "--model.backbone.image_size", "32", "--model.backbone.pretrained", "false"]


@pytest.mark.parametrize("name", [name for name in FILES if kind(name) == "segmentation"])
def test_segmentation_row_runs(name, pictures, tmp_path):
    backbone = ["--model.backbone.image_size", "32"] if name.endswith("unet.yaml") else SMALL_VIT  # as wide as the encoder of the table
    words = ["--config", str(FILES["task/segment_drive.yaml"]), "--config", str(FILES[name]), *SEGMENT, "--data.patch", "32"]
    finished(cli := run(tmp_path / "run", *words, *backbone), tmp_path / "run")
    given = (yaml.safe_load(FILES[name].read_text())["adapter"].get("method") or {"class_path": "Full"})["class_path"]
    assert type(cli.adapter.adapters.method).__name__ == given
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("task/segment_")])
def test_segmentation_task_runs(name, pictures, tmp_path):
    convolutional = ["--model.backbone.name", "resnet18", "--model.backbone.image_size", "64", "--model.backbone.pretrained", "false"]
    patches = [*SMALL_VIT, "--data.patch", "32"]
    small = patches if "drive" in name else [*convolutional, "--adapter.targets", "[vision.layer1.*]"]
    finished(run(tmp_path / "run", "--config", str(FILES[name]), *SEGMENT, *small), tmp_path / "run")


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("recipe/salt")])
def test_recipe_of_salt_parses(name, monkeypatch):
    config = parse(monkeypatch, "--config", str(FILES[name]))
    assert config["data"]["init_args"]["file"].split("/")[0] == Path(name).stem.removeprefix("salt_")
    assert config["model"]["init_args"]["backbone"]["init_args"]["compat"] == "salt"
    assert config["adapter"]["method"]["init_args"]["ranks"] == {"*attn*": 760, "*mlp*": 50, "*neck*": 250}


@pytest.fixture
def pristine(tmp_path):
    """Twelve pictures that are large enough for crops of 16."""
    (tmp_path / "pristine").mkdir()
    for seed in range(12):
        coarse = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((80, 80), Image.Resampling.BICUBIC).save(tmp_path / "pristine" / f"{seed}.png")
    return tmp_path / "pristine"


@pytest.mark.parametrize("name", ["task/quality_effnet.yaml", "task/quality_resnet18.yaml", "recipe/re_iqa.yaml"])
def test_quality_task_runs(name, pristine, tmp_path):
    small = ["--model.backbone.name", "test_resnet", "--model.backbone.pretrained", "false", "--model.backbone.image_size", "32"]
    few = ["--data.images", str(pristine), "--data.patch", "16", "--data.batch_size", "2", "--data.num_workers", "0", "--model.queue", "50"]
    short = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    alone = ["--trainer.sync_batchnorm", "false"] if name.startswith("recipe") else []  # it needs a process group
    cli = run(tmp_path / "run", "--config", str(FILES[name]), *small, *few, *short, *alone)
    finished(cli, tmp_path / "run")
    assert (tmp_path / "run" / ("adapter" if "effnet" in name else "encoder")).is_dir()
    optimizer = {"recipe/re_iqa.yaml": "Lars", "task/quality_resnet18.yaml": "SGD"}.get(name, "AdamW")
    assert type(cli.trainer.optimizers[0]).__name__ == optimizer


@pytest.mark.parametrize("name", ["task/generator_faces.yaml", "task/hybrid_faces.yaml"])
def test_generator_task_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("VISION_PEFT_CACHE", str(tmp_path / "cache"))
    unconditional(tmp_path / "generator")
    rows = ["path,domain,split"]
    for domain in ("smile", "sunglasses", "smile+sunglasses"):
        for index in range(4):
            pixels = np.random.default_rng(index).integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{domain}_{index}.png")
            rows.append(f"{domain}_{index}.png,{domain},{'shot' if index < 2 else 'ref'}")
    (tmp_path / "split.csv").write_text("\n".join([*rows, ""]))
    small = ["--model.backbone.name", str(tmp_path / "generator"), "--data.images", str(tmp_path / "split.csv"), "--model.samples", "0"]
    tiny = "{class_path: vision_peft.backbones.Vit, init_args: {name: test_vit, pretrained: false, image_size: 32}}"
    hybrid = ["--model.encoders", f"[{tiny}]", "--model.judge", "null", "--data.sources", "4", "--model.sample_steps", "2"]
    short = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    finished(run(tmp_path / "run", "--config", str(FILES[name]), *small, *(hybrid if "hybrid" in name else []), *short), tmp_path / "run")


@pytest.mark.parametrize("name", ["recipe/dreambooth_sd15.yaml", "recipe/hybrid_sd15.yaml"])
def test_recipe_of_a_text_generator_runs(name, tmp_path, monkeypatch):
    """On a pipeline of the same parts, an autoencoder, a text encoder and a conditional UNet, but small."""
    monkeypatch.setenv("VISION_PEFT_CACHE", str(tmp_path / "cache"))
    stable_diffusion(tmp_path / "generator")
    for folder in ("subject", "class", "styles/sketches", "styles/van_gogh"):
        (tmp_path / folder).mkdir(parents=True)
        for index in range(3):
            Image.effect_noise((20, 20), 20 + 20 * index).convert("RGB").save(tmp_path / folder / f"{index}.png")
    init = yaml.safe_load(FILES[name].read_text())["model"]["init_args"]
    small = ["--model.backbone.name", str(tmp_path / "generator"), "--model.sample_steps", "2", "--model.samples", "2"]
    if init.get("sample_prompts"):  # the words that the small tokenizer has: letters
        small += ["--model.sample_prompts", "[a b, c]", "--data.prompt", "s d", "--data.prior_prompt", "d"]
        small += ["--data.images", str(tmp_path / "subject"), "--data.prior", str(tmp_path / "class")]
    else:
        tiny = "{class_path: vision_peft.backbones.Vit, init_args: {name: test_vit, weights: null, pretrained: false, image_size: 32}}"
        small += ["--model.encoders", f"[{tiny}]", "--model.judge", "null", "--model.measured", "2"]
        small += ["--data.images", str(tmp_path / "styles"), "--data.prompts", "[a, b]", "--data.sources", "4"]
    short = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    cli = run(tmp_path / "run", "--config", str(FILES[name]), *small, *short)
    finished(cli, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "last.png").is_file()
    assert (tmp_path / "cache" / "latents").exists() == (init.get("cache") == "disk")


# ---- sequences ----


@pytest.mark.parametrize("name", [name for name in FILES if kind(name) == "sequence"])
def test_a_sequence_overrides_the_set_of_its_task(name, monkeypatch, tmp_path):
    tasks = read_sequence(str(FILES[name]))
    assert len(tasks) == {"offline": 5, "xtail": 10, "mtil": 11}[Path(name).stem]
    for task in tasks:
        (tmp_path / "task.yaml").write_text(yaml.safe_dump(nested(task.settings())))
        config = parse(monkeypatch, "--config", str(FILES["task/continual_clip.yaml"]), "--config", str(tmp_path / "task.yaml"))
        data = config["data"]["init_args"]
        assert data["source"]["class_path"].endswith(f".{task.source['class_path']}") and data["template"] == task.template
        assert data["shots"] == (task.shots or 16)


# ---- trainers ----


def test_trainer_cpu_runs(tmp_path):
    cli = run(tmp_path / "run", "--config", VIT, "--config", str(FILES["trainer/cpu.yaml"]), *TINY, *LAST)
    finished(cli, tmp_path / "run")
    assert cli.trainer.precision == ("bf16-mixed" if cpu_has_bfloat16() else "32-true")


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer_parses(name, monkeypatch):
    """Parsing only: Lightning refuses to build a trainer for a GPU where there is none, and ddp would start a process a device.

    ddp on two CPU processes is run by tests/end_to_end/test_ddp.py; gpu and fsdp are run nowhere in this project.
    """
    config = parse(monkeypatch, "--config", VIT, "--config", str(FILES[name]))
    wanted = yaml.safe_load(FILES[name].read_text())["trainer"]
    assert {key: config["trainer"][key] for key in wanted if key != "strategy"} == {k: v for k, v in wanted.items() if k != "strategy"}
    strategy, found = wanted.get("strategy", "auto"), config["trainer"]["strategy"]
    if isinstance(strategy, dict):
        assert found["class_path"] == strategy["class_path"]
        given = {key: getattr(value, "name", value) for key, value in found["init_args"].items()}  # words may become enums
        assert given.items() >= strategy["init_args"].items()
    else:
        assert found == strategy


@pytest.mark.parametrize("name", [name for name in FILES if kind(name) in ("task", "quickstart")])
def test_tasks_parse_as_they_stand(name, monkeypatch):
    config = parse(monkeypatch, "--config", str(FILES[name]))
    assert config["run"].startswith(f"checkpoints/{Path(name).stem}")  # a number is added where a run is already
    assert config["seed_everything"] == 1
