"""methods, backbones, targets, and how much --help imports."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from tiny_settings import QUICKSTART

from vision_peft.backbones.vit import Vit
from vision_peft.cli import COMMANDS, main
from vision_peft.engine.adapter import find_method, method_names


def out(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def test_methods_lists_the_whole_catalogue(capsys):
    rows = out(capsys, "methods").splitlines()[2:]
    assert [row.split()[0] for row in rows[: len(method_names())]] == method_names()
    assert all(each["formula"] for each in json.loads(out(capsys, "methods", "--json")))


@pytest.mark.parametrize("name", method_names())
def test_a_method_has_a_page(name, capsys):
    page = out(capsys, "methods", name)
    assert f"class_path: {find_method(name).__name__}" in page
    assert len(page.splitlines()) > 10


def test_a_method_is_found_by_its_class_and_shows_defaults(capsys):
    page = out(capsys, "methods", "CompLoRA")
    assert "rank | sqrt_rank" in page and "protect_energy" in page and "0.25" in page
    assert json.loads(out(capsys, "methods", "lora", "--json"))["hyperparameters"]["rank"] == 8


def test_an_unknown_method(error_line):
    assert "did you mean lora" in error_line(["methods", "loraa"])


def test_backbones_without_pattern_are_the_offline_ones(capsys):
    text = out(capsys, "backbones")
    assert text.startswith("name") and "offline:dinov2_vits14" in text and "22.1 M" in text
    assert "class_path: vision_peft.backbones.Vit" in text and "class_path: vision_peft.backbones.Sam" in text


def test_backbones_by_pattern_come_from_timm_and_open_clip(capsys):
    text = out(capsys, "backbones", "siglip")
    assert "vit_base_patch16_siglip_224" in text and "ViT-B-16-SigLIP " in text and "offline:" not in text
    assert "0 backbones" in out(capsys, "backbones", "nothing_like_this")


def test_targets_of_a_config_read_no_weights(config, capsys, monkeypatch):
    monkeypatch.setattr(Vit, "load", lambda self: pytest.fail("weights were read"))
    text = out(capsys, "targets", "--config", QUICKSTART, "--adapter.method.rank", "4", "--targets", "vision.{6..8}.attn.q")
    assert "rank=4" in text and "vision.8.attn.q" in text and "vision.5.attn.q" not in text
    assert any(line.split() == ["qv", "18"] for line in text.splitlines())
    assert "64 x 64" in out(capsys, "targets", "-c", config, "--all")


def test_targets_of_a_backbone_by_name(capsys):
    assert "vision.0.attn.q" in out(capsys, "targets", "--backbone", "test_vit", "--targets", "qv", "vision.0.mlp.fc1")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --config FILE, or --backbone NAME"),
        (["--backbone", "test_vitt"], "did you mean"),
        (["--backbone", "test_vit", "--adapter.method", "LoRA"], "leave out --adapter.method"),
        (["--backbone", "test_vit", "--targets", "vision.9.attn.q"], "matches no layer; did you mean"),
        (["--config", QUICKSTART, "--targets", "vision.44.attn.q"], "matches no layer; did you mean vision.4.attn.q"),
    ],
)
def test_targets_of_nothing(argv, message, error_line):
    assert message in error_line(["targets", *argv])


def test_help_is_quick_and_imports_no_torch():
    code = "import sys; from vision_peft.cli import main; main(['--help']); sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 2  # about 0.1 s on an idle machine; torch alone takes 1.5 s
    assert all(command in done.stdout for command in COMMANDS)


def test_methods_imports_no_lightning():
    code = "import sys; from vision_peft.cli import main; main(['methods']); sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("command", [name for name, (module, _) in COMMANDS.items() if module != "run"])
def test_every_tool_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: vision-peft {command}")
