"""Adaptation of generators in this process: fine-tuning, prior pictures, averages, grids, hybrid domains, the sample command."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from generators import classes, stable_diffusion, unconditional
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from vision_peft.backbones import Diffusion
from vision_peft.cli import main
from vision_peft.commands.run import RunCLI, make_cli
from vision_peft.data.generator_images import GeneratorImages
from vision_peft.data.target_domains import TargetDomains
from vision_peft.engine.store import read_config
from vision_peft.errors import UserError
from vision_peft.generation.sampling import draw_noise, sample
from vision_peft.tasks.directional_subspace import distance_loss
from vision_peft.tasks.weight_average import WeightAverage

TRAINER = {"accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0, "logger": True}
SMALL_VIT = {"class_path": "vision_peft.backbones.Vit", "init_args": {"name": "test_vit", "pretrained": False, "image_size": 32}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A generator and pictures of two domains: red on the left, and blue at the top."""
    folder = tmp_path_factory.mktemp("generators")
    unconditional(folder / "plain")
    stable_diffusion(folder / "text")
    classes(folder / "classes")
    rows = ["path,domain,split,prompt"]
    draw = np.random.default_rng(0)
    for domain in ("red", "blue"):
        for index in range(5):
            pixels = draw.integers(100, 156, (20 + index, 24, 3), dtype=np.uint8)
            pixels[:, :12, 0] = 255 if domain == "red" else pixels[:, :12, 0]
            pixels[:10, :, 2] = 255 if domain == "blue" else pixels[:10, :, 2]
            Image.fromarray(pixels).save(folder / f"{domain}_{index}.png")
            rows.append(f"{domain}_{index}.png,{domain},{'shot' if index < 3 else 'ref'},a {domain[0]} b")
    (folder / "split.csv").write_text("\n".join([*rows, ""]))
    return folder


def config(place: Path, task: str, model: dict, data: dict, **more: object) -> dict:
    kind = "GeneratorImages" if task == "DiffusionFineTuning" else "TargetDomains"
    source = {"images": str(place / "split.csv"), "batch_size": 2, "seed": 1}
    backbone = {"class_path": "vision_peft.backbones.Diffusion", "init_args": {"name": str(place / model.pop("generator", "plain"))}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.0}}
    shown = {"samples": 2, "sample_steps": 2}
    return {
        "seed_everything": 1,
        "model": {"class_path": task, "init_args": {"backbone": backbone, "optimizer": optimizer, **shown, **model}},
        "data": {"class_path": kind, "init_args": {**source, **data}},
        "adapter": {"method": {"class_path": "LoRA", "init_args": {"rank": 4}}, "targets": ["attn", "*conv1"], **more.pop("adapter", {})},
        "trainer": {**TRAINER, "max_steps": 4, **more},
    }


def fit(settings: dict, folder: Path, command: str = "fit", *words: str) -> RunCLI:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return make_cli(command, ["--config", str(path), "--run", str(folder / "run"), *words], run=True)


RED = {"domain": "red", "split": "shot", "held_out": "ref", "prompt": ""}


# ---- fine-tuning ----


def test_fine_tuning_learns_and_writes_pictures_and_an_adapter(place, tmp_path):
    settings = config(place, "DiffusionFineTuning", {"average": 0.9}, {**RED, "repeat": 4}, max_steps=60, check_val_every_n_epoch=5)
    cli = fit(settings, tmp_path)
    losses = [float(row["val/loss"]) for row in csv.DictReader((tmp_path / "run" / "metrics.csv").open()) if row["val/loss"]]
    assert losses[-1] < 0.9 * losses[0]
    shown = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert shown[0] == "last.png" and "step_000030.png" in shown
    stored = read_config(tmp_path / "run" / "adapter")
    assert stored["backbone"]["class"] == "Diffusion" and not stored["parts"]
    # what was exported is the average, not the last iterate
    averaged, last = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"), cli.model.average
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kept = {key.removeprefix("adapters."): value for key, value in state.items() if key.startswith("adapters.")}
    assert kept.keys() == averaged.keys() and not any(torch.equal(kept[key], averaged[key]) for key in kept)
    assert int(last.updates) == 60


def test_the_loss_is_the_weighted_error_of_the_schedule(place, tmp_path):
    cli = fit(config(place, "DiffusionFineTuning", {}, RED), tmp_path)
    task, images = cli.model, torch.rand(3, 3, 16, 16) * 2 - 1
    torch.manual_seed(5)
    found = task._error(images, ["", "", ""])
    torch.manual_seed(5)
    noise, t = torch.randn(3, 3, 16, 16), torch.randint(0, 1000, (3,))
    abar = task.backbone.scheduler.alphas_cumprod[t]
    mixed = abar.sqrt()[:, None, None, None] * images + (1 - abar).sqrt()[:, None, None, None] * noise
    error = (task.backbone.network(mixed, t).sample - noise).square().mean((1, 2, 3))
    weight = (abar / (1 - abar)).clamp(max=5.0) / (abar / (1 - abar))
    torch.testing.assert_close(found, (weight * error).mean(), rtol=1e-4, atol=1e-6)


def test_training_from_kept_latents_is_training_from_pictures(place, tmp_path):
    trained = {}
    for cache in ("off", "memory", "disk"):
        (tmp_path / cache).mkdir()
        data = {**RED, "prompt": None, "repeat": 2}
        fit(config(place, "DiffusionFineTuning", {"generator": "text", "cache": cache, "samples": 0}, data, max_steps=6), tmp_path / cache)
        trained[cache] = load_file(tmp_path / cache / "run" / "adapter" / "adapter_model.safetensors")
    for key, value in trained["off"].items():
        torch.testing.assert_close(trained["memory"][key], value, rtol=0, atol=1e-4)
        torch.testing.assert_close(trained["disk"][key], trained["memory"][key], rtol=0, atol=0)


def test_text_models_with_prior_pictures(place, tmp_path):
    data = {**RED, "prompt": None, "prior": str(place / "split.csv"), "prior_domain": "blue", "prior_prompt": "z"}
    cli = fit(config(place, "DiffusionFineTuning", {"generator": "text", "guidance": 2.0}, data), tmp_path)
    assert cli.trainer.global_step == 4
    batch = next(iter(cli.datamodule.train_dataloader()))
    assert batch["prior_prompt"] == ["z", "z"] and batch["prior_image"].shape == (2, 8, 8, 8)  # mean and log-variance of latents
    torch.manual_seed(0)
    both = cli.model.loss(batch)
    torch.manual_seed(0)
    own = cli.model._error(batch["image"], batch["prompt"]) + cli.model._error(batch["prior_image"], batch["prior_prompt"])
    torch.testing.assert_close(both, own)


def test_models_of_classes(place, tmp_path):
    settings = config(place, "DiffusionFineTuning", {"generator": "classes"}, {**RED, "prompt": "3"}, adapter={"targets": "qv"})
    assert fit(settings, tmp_path).trainer.global_step == 4


@pytest.mark.parametrize("method", ["DoRA", "SVFit", "LoCA", "WaRA", "LoLDU", "SNELLA", "TLoRA"])
def test_methods_of_the_catalogue_on_a_generator(place, tmp_path, method):
    rank = {"init_args": {"rank": 4}} if method in ("DoRA", "SVFit") else {}
    chosen = {"class_path": method, **rank}
    settings = config(place, "DiffusionFineTuning", {"samples": 0}, RED, adapter={"method": chosen, "targets": "attn"})
    fit(settings, tmp_path)
    assert read_config(tmp_path / "run" / "adapter")["method"]["name"] == method.lower()


def test_test_measures_held_out_pictures(place, tmp_path):
    settings = config(place, "DiffusionFineTuning", {"judge": SMALL_VIT, "measured": 4}, RED)
    fit(settings, tmp_path)
    cli = fit(settings, tmp_path, "test", "--ckpt_path", str(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    found = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    assert 0 < found["test/loss"] < 10
    assert found["test/distance/domain"] > 0 and found["test/consistency"] <= 1 and "test/kid/domain" in found


# ---- the average ----


def test_the_average_is_the_recursion_and_swaps_back():
    layer = nn.Linear(2, 1, bias=False)
    average, expected = WeightAverage(layer, 0.5), layer.weight.detach().clone()
    for n in range(1, 9):
        layer.weight.data.add_(1.0)
        average.update(layer)
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * layer.weight.detach()
    own = layer.weight.detach().clone()
    average.swap(layer)
    torch.testing.assert_close(layer.weight.detach(), expected)
    average.swap(layer)
    assert torch.equal(layer.weight.detach(), own)


# ---- data ----


def test_pictures_of_any_shape_come_in_the_generators_size(place):
    data = GeneratorImages(str(place / "split.csv"), **{**RED, "prompt": None}, flip=False)
    data.preprocess = Diffusion(str(place / "plain")).preprocess
    assert data.images("train").shape == (3, 3, 16, 16) and len(data.images("val")) == 2
    item = data.train_dataloader().dataset[(0, 0)]
    assert item["image"].min() >= -1 and item["image"].max() <= 1 and item["prompt"] == "a r b"
    assert item["image"][0, :, :6].min() > 0.9, "red on the left"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"domain": "read"}, "no row of .* has domain 'read'; there are red, blue; did you mean red"),
        ({"domain": "red", "split": "train"}, "has split 'train'; there are shot, ref"),
        ({"images": "nothing.csv"}, "does not exist"),
        ({"batch_size": 0}, "data.batch_size"),
    ],
)
def test_data_that_are_not_there(place, options, message):
    with pytest.raises(UserError, match=message):
        GeneratorImages(**{"images": str(place / "split.csv"), **options})


def test_an_empty_folder_and_a_broken_picture(place, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no picture in"):
        GeneratorImages(str(tmp_path / "empty"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    broken = GeneratorImages(str(tmp_path / "broken"))
    broken.preprocess = Diffusion(str(place / "plain")).preprocess
    with pytest.raises(UserError, match=r"a\.png: cannot be decoded"):
        broken.train_dataloader()


def test_domains_from_folders_and_their_weights(place, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Image.open(place / "red_0.png").save(tmp_path / name / "a.png")
    data = TargetDomains(str(tmp_path), {"one": 3.0, "two": 1.0})
    assert data.weights == {"one": 0.75, "two": 0.25}
    data.preprocess = Diffusion(str(place / "plain")).preprocess
    assert torch.equal(data.references("one")[1], data.references("one")[0].flip(2))
    assert torch.equal(data.held_out("one"), data.shots("one"))
    with pytest.raises(UserError, match="holds no folder 'tow'; did you mean two"):
        TargetDomains(str(tmp_path), ["tow"])
    with pytest.raises(UserError, match=r"data\.domains"):
        TargetDomains(str(tmp_path), {"one": 0.0})


# ---- hybrid domains ----


HYBRID = {"encoders": [SMALL_VIT], "measured": 4, "sample_steps": 3, "times": [0.05, 0.4]}


@pytest.mark.parametrize("mode, ways", [("one_step", "picture"), ("trajectory", "picture"), ("one_step", "mean")])
def test_the_hybrid_comes_nearer_to_both_domains(place, tmp_path, mode, ways):
    data = {"domains": ["red", "blue"], "sources": 16, "mirror": False}
    model = {**HYBRID, "mode": mode, "trajectory_steps": 2, "ways": ways, "whiten": 1.0 if ways == "mean" else None}
    cli = fit(config(place, "HybridDomainAdaptation", model, data, max_steps=40, log_every_n_steps=1), tmp_path)
    first = next(row for row in csv.DictReader((tmp_path / "run" / "metrics.csv").open()) if row["train/cosine/red"])
    assert float(first["train/cosine/red"]) == 0, "an adapter that is the identity changes nothing"
    task, batch = cli.model, {"source": torch.arange(16), "seed": torch.arange(16)}

    def distances() -> list[float]:
        with torch.no_grad():
            features = task._mapped(0, task.encoders[0](task._walk(*task._mixed(batch), {})))
        spaces, start = task.spaces[0], task.starts[0]
        return [float(distance_loss(features, {name: space}, {name: 1.0}, 1, start)) for name, space in spaces.items()]

    with task.frozen():
        before = distances()
    assert all(now < 0.95 * then for now, then in zip(distances(), before))
    stored = read_config(tmp_path / "run" / "adapter")
    assert stored["domains"]["red"] == {"weight": 0.5, "references": 3} and stored["acts"] == [0.05, 0.4]
    assert cli.trainer.callback_metrics["val/consistency"] <= 1
    if (mode, ways) == ("one_step", "picture"):  # other layouts cannot say at which times an adapter acts
        with pytest.warns(UserWarning, match=r"acts between 0\.05 and 0\.4 of the noise schedule only, which --to pipeline cannot say"):
            assert main(["export", str(tmp_path / "run"), "--to", "pipeline", "--output", str(tmp_path / "pipeline")]) == 0


@pytest.mark.parametrize("generator, prompts", [("text", ["a b", "c"]), ("classes", ["1", "4"])])
def test_generators_with_prompts_start_from_pictures_of_them(place, tmp_path, monkeypatch, generator, prompts):
    monkeypatch.setenv("VISION_PEFT_CACHE", str(tmp_path / "cache"))  # or an earlier run would answer
    data = {"domains": ["red", "blue"], "sources": 4, "mirror": False, "prompts": prompts}
    model = {**HYBRID, "generator": generator, "guidance": 2.0, "veil": 1}
    cli = fit(config(place, "HybridDomainAdaptation", model, data, max_steps=2, adapter={"targets": ["attn"]}), tmp_path)
    task = cli.model
    noise = draw_noise(task.backbone, 4, 1)
    told, free = (task.backbone.condition(words * 2) for words in (prompts, [task.backbone.no_prompt] * 2))
    with task.frozen():
        torch.testing.assert_close(task.bank, sample(task.backbone, noise, told, 3, 2.0, free), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(task.bank[0], task.bank[1], atol=1e-2)
    told = {name: value[1:2] if torch.is_tensor(value) else value for name, value in told.items()}
    with task.frozen(), torch.no_grad():  # the second of the generator's own pictures goes with the second prompt
        x, t = task._mixed({"source": torch.tensor([1]), "seed": torch.tensor([7])})
        expected = task.backbone.decode(task.backbone.clean(x, t, told))
        asked = task.encodings.condition([task.prompts_shown(cli.datamodule, 4)[1]])
        torch.testing.assert_close(task.backbone.decode(task._walk(x, t, asked)), expected, rtol=1e-4, atol=1e-4)


def test_without_adapters_the_change_is_exactly_nothing(place, tmp_path):
    """Both passes of a pair use the same x, t and kernels; what is left of the loss is the distance alone plus one for the direction."""
    data = {"domains": {"red": 1.0}, "sources": 4}
    cli = fit(config(place, "HybridDomainAdaptation", {**HYBRID, "average": None}, data, max_steps=1), tmp_path)
    batch = next(iter(cli.datamodule.train_dataloader()))
    with cli.model.frozen():
        loss = cli.model.loss(batch)
        x, t = cli.model._mixed(batch)
        features = cli.model.encoders[0](cli.model._walk(x, t, {}))
    expected = cli.model.spaces[0]["red"].distance(features).mean() + 1
    torch.testing.assert_close(loss, expected.to(loss))


def test_hybrid_refuses_what_it_cannot_do(place, tmp_path):
    data = {"domains": ["red"], "sources": 4}
    for model, message in (
        ({**HYBRID, "guidance": 2.0}, "model.guidance: is for models that take prompts"),
        ({**HYBRID, "times": [0.5, 0.2]}, "model.times"),
        ({**HYBRID, "encoders": []}, "model.encoders: is empty"),
        ({**HYBRID, "whiten": 0.0}, "model.whiten: must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            fit(config(place, "HybridDomainAdaptation", dict(model), data), tmp_path)


# ---- sampling ----


def test_adapters_act_between_two_times(place, tmp_path):
    cli = fit(config(place, "DiffusionFineTuning", {}, RED, max_steps=10), tmp_path)
    backbone, noise = cli.model.backbone.eval(), draw_noise(cli.model.backbone, 2, 0)
    always, never = sample(backbone, noise, steps=4), sample(backbone, noise, steps=4, acts=(1.0, 1.0))
    with cli.model.frozen():
        frozen = sample(backbone, noise, steps=4)
    torch.testing.assert_close(never, frozen, rtol=0, atol=0)
    assert not torch.allclose(always, frozen, atol=1e-3)
    early, late = (sample(backbone, noise, steps=4, acts=acts) for acts in ((0.4, 1.0), (0.0, 0.4)))
    for found in (early, late):
        assert not torch.allclose(found, frozen, atol=1e-4) and not torch.allclose(found, always, atol=1e-4)


def test_sample_by_command(place, tmp_path, capsys):
    for name, domain in (("a", "red"), ("b", "blue")):
        (tmp_path / name).mkdir()
        fit(config(place, "DiffusionFineTuning", {"samples": 0}, {**RED, "domain": domain}), tmp_path / name)
    runs = [str(tmp_path / name / "run") for name in ("a", "b")]
    grid, page = str(tmp_path / "grid.png"), str(tmp_path / "grid.html")
    files = ["--output", grid, "--html", page, "--pictures", str(tmp_path / "each")]
    words = [*files, "--count", "3", "--steps", "2", "--weights", "0.5", "0.5"]
    assert main(["sample", *runs, *words]) == 0
    assert len(list((tmp_path / "each").rglob("*.png"))) == 4 * 3, "frozen, two adapters, and their mix"
    assert "0.5 x" in Path(page).read_text() and "data:image/png;base64," in Path(page).read_text()
    first = Path(grid).read_bytes()
    assert main(["sample", *runs, *words]) == 0
    assert Path(grid).read_bytes() == first
    assert main(["sample", "--backbone", str(place / "classes"), "--prompts", "1", "2", "--output", grid, "--steps", "2"]) == 0
    capsys.readouterr()
    for bad, message in (
        ([], "give run or adapter folders, or --backbone"),
        ([*runs, "--weights", "1"], "--weights: 1 for 2 adapters"),
        (["--backbone", str(place / "plain"), "--prompts", "a cat"], "takes no prompt"),
        (["--backbone", str(place / "plain"), "--scheduler", "DDIMSchedular"], "did you mean DDIMScheduler"),
        (["--backbone", str(place / "plain"), "--count", "0"], "--count: must be at least 1"),
    ):
        assert main(["sample", *bad, "--output", grid]) == 2
        assert message in capsys.readouterr().err
