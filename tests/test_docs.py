"""The Python in the pages is real: the worked method keeps the contract, and a run's adapter loads in plain Python."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from vision_peft.cli import main
from vision_peft.engine.adapter import Adapter, Method, find_method, method_names
from vision_peft.engine.contract import CHECKS, run_contract
from vision_peft.engine.install import attach
from vision_peft.engine.site import enumerate_sites

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text()


def block(language: str, page: str = PAGE) -> str:
    [found] = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def method(monkeypatch) -> type[Method]:
    """The example as the module it would be, vision_peft/adapters/scaled_columns.py, for the time of a test."""
    name = "vision_peft.adapters.scaled_columns"
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Method, "registry", dict(Method.registry))
    exec(compile(block("python"), f"{name} (docs/adding_a_method.md)", "exec"), module.__dict__)
    return find_method("scaled_columns")


@pytest.mark.parametrize(
    "network, shape",
    [
        (nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8)), (5, 12)),
        (nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.GELU(), nn.Conv2d(8, 6, 3, stride=2)), (2, 4, 7, 7)),
        (nn.TransformerEncoderLayer(16, 2, 20, dropout=0.0, batch_first=True), (3, 6, 16)),
    ],
    ids=["linear", "conv", "attention"],
)
def test_the_example_keeps_the_contract(method, network, shape):
    x = torch.randn(shape)
    checks = run_contract(network, enumerate_sites(network), method(), lambda each: each(x))
    assert [check.name for check in checks] == list(CHECKS)
    assert not [check for check in checks if not check.passed]
    assert not [check for check in checks if check.detail.startswith("skipped") and check.name != "survives_pickle"]


def test_the_example_is_what_its_text_says(method):
    network = nn.Sequential(nn.Linear(6, 4))
    adapter = attach(network, method(), "all").adapters["0"]
    assert method.name == "scaled_columns"
    assert repr(method()) == "ScaledColumns()"
    x, gains = torch.randn(3, 6), torch.randn(6)
    with torch.no_grad():
        adapter.s.copy_(gains)
    torch.testing.assert_close(network(x), nn.functional.linear(x * (1 + gains), network[0].weight, network[0].bias))


def test_the_yaml_names_the_example(method):
    assert yaml.safe_load(block("yaml")) == {"adapter": {"method": {"class_path": method.__name__}}}


def test_the_methods_page_is_what_the_command_prints(capsys):
    """Written by `vision-peft methods --markdown > docs/methods.md`."""
    assert main(["methods", "--markdown"]) == 0
    assert (ROOT / "docs" / "methods.md").read_text() == capsys.readouterr().out


def test_every_method_says_when_to_choose_it():
    assert not [name for name in method_names() if not find_method(name).advice.endswith(".")]


def test_the_page_tells_the_whole_contract():
    """Every check, every flag and every method of the two classes is on the page, and nothing that is gone."""
    for name in CHECKS:
        assert f"`{name}`" in PAGE, name
    flags = {name for name in Method.__annotations__ if name not in ("registry", "name")}
    assert {"identity_at_init", "merge", "low_rank"} <= flags
    hooks = {name for cls in (Adapter, Method) for name, value in vars(cls).items() if callable(value) and not name.startswith("_")}
    for name in flags | (hooks - {"hyperparameters"}):
        assert re.search(rf"`{name}\b", PAGE), name


def test_loading_a_run_in_plain_python(tmp_path):
    """The block of checkpoints/README.md, with a tiny backbone in the place of DINOv2, on a run of two steps."""
    run = f"""
    fit --config {ROOT}/configs/quickstart.yaml --run {tmp_path}/run --trainer.max_steps 2 --trainer.enable_progress_bar false
    --data.shots 1 --model.backbone.name test_vit --model.backbone.image_size 32 --model.backbone.pretrained false
    """
    assert main([*run.split(), "--trainer.callbacks", "null"]) == 0
    program = block("python", (ROOT / "checkpoints" / "README.md").read_text())
    for there, here in (("checkpoints/quickstart", f"{tmp_path}/run"), ("1, 3, 56, 56", "2, 3, 32, 32")):
        assert there in program
        program = program.replace(there, here)
    full, tiny = 'Vit("offline:dinov2_vits14", image_size=56)', 'Vit("test_vit", image_size=32, pretrained=False)'
    assert full in program
    scope: dict = {}
    torch.manual_seed(1)  # the run's: test_vit has no weights of its own
    exec(compile(program.replace(full, tiny), "checkpoints/README.md", "exec"), scope)
    assert scope["logits"].shape == (2, 10)
    assert scope["frozen"].shape == (2, scope["backbone"].num_features)
