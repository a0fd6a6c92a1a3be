"""Files laid over one another: keys, classes, and what the parser makes of the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vision_peft.cli import main
from vision_peft.commands.config_merge import merge_configs, overlaid
from vision_peft.commands.run import RunCLI, make_cli

LORA = {"class_path": "LoRA", "init_args": {"rank": 2, "alpha": 4}}


@pytest.mark.parametrize(
    "below, above, expected",
    [
        ({"a": 1, "b": {"c": 2}}, {"b": {"d": 3}}, {"a": 1, "b": {"c": 2, "d": 3}}),
        ({"m": LORA}, {"m": {"class_path": "SVFit"}}, {"m": {"class_path": "SVFit"}}),
        ({"m": LORA}, {"m": {"init_args": {"rank": 7}}}, {"m": {"class_path": "LoRA", "init_args": {"rank": 7, "alpha": 4}}}),
        ({"m": LORA}, {"m": {"class_path": "LoRA", "init_args": {"rank": 7}}}, {"m": {**LORA, "init_args": {"rank": 7, "alpha": 4}}}),
        ({"m": LORA}, {"m": None}, {"m": None}),
        ({"m": None}, {"m": LORA}, {"m": LORA}),
        ({"l": [1, 2]}, {"l": [3]}, {"l": [3]}),
    ],
)
def test_overlaid(below, above, expected):
    assert overlaid(below, above) == expected


def test_one_file_stays_a_file():
    assert merge_configs(["--config", "a.yaml", "--run", "x"]) == ["--config", "a.yaml", "--run", "x"]


def test_settings_of_the_earlier_class_do_not_reach_the_later_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr(RunCLI, "instantiate_classes", lambda self: None)
    (tmp_path / "method.yaml").write_text(yaml.safe_dump({"adapter": {"method": {"class_path": "SVFit"}}}))
    over = str(tmp_path / "method.yaml")
    for words in (["--config", config, "--config", over], [f"--config={config}", f"--config={over}"]):
        found = make_cli("fit", words, run=False).config["fit"].adapter.method
        assert found.class_path.endswith("SVFit") and found.init_args.rank is None


@pytest.mark.parametrize(
    "word", ["--adapter.method SVFit", "--adapter.method=SVFit", "--adapter.method {class_path: vision_peft.adapters.svfit.SVFit}"]
)
def test_nor_do_they_reach_a_class_that_a_word_names(config, monkeypatch, word):
    monkeypatch.setattr(RunCLI, "instantiate_classes", lambda self: None)
    found = make_cli("fit", ["--config", config, *word.split(" ", 1)], run=False).config["fit"].adapter.method
    assert found.class_path.endswith("SVFit") and found.init_args.rank is None
    found = make_cli("fit", ["--config", config, *word.split(" ", 1), "--adapter.method.rank", "2"], run=False).config["fit"].adapter.method
    assert found.init_args.rank == 2
    found = make_cli("fit", ["--config", config, "--adapter.method.alpha", "3", "--adapter.method", "LoRA"], run=False).config["fit"]
    assert found.adapter.method.init_args.rank == yaml.safe_load(Path(config).read_text())["adapter"]["method"]["init_args"]["rank"]


@pytest.mark.parametrize("words", [["--model.backbone.weights", "null"], ["--model.backbone.weights=null"]])
def test_null_is_null_in_a_class_in_a_class(config, monkeypatch, words):
    monkeypatch.setattr(RunCLI, "instantiate_classes", lambda self: None)
    found = make_cli("fit", ["--config", config, *words, "--run", "x"], run=False).config["fit"]
    assert found.model.init_args.backbone.init_args.weights is None and found.run == "x"


def test_words_reach_through_the_class_above(config, monkeypatch):
    """As `--model.optimizer`, which stands in a file under model.init_args."""
    monkeypatch.setattr(RunCLI, "instantiate_classes", lambda self: None)
    tree = yaml.safe_load(Path(config).read_text())
    tree["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.25}}
    Path(config).write_text(yaml.safe_dump(tree))
    found = make_cli("fit", ["--config", config, "--model.optimizer", "torch.optim.SGD"], run=False).config["fit"].model.init_args
    assert found.optimizer.class_path.endswith("SGD") and found.optimizer.init_args.lr != 0.25
    found = make_cli("fit", ["--config", config, "--model.optimizer", "torch.optim.AdamW"], run=False).config["fit"].model.init_args
    assert found.optimizer.init_args.lr == 0.25


def test_a_mistake_in_one_of_several_files_still_names_it(config, tmp_path, error_line):
    (tmp_path / "method.yaml").write_text(yaml.safe_dump({"adapter": {"method": {"class_path": "LoRA", "init_args": {"rnk": 2}}}}))
    line = error_line(["fit", "--config", config, "--config", str(tmp_path / "method.yaml")])
    assert "method.yaml" in line and "rnk" in line and "rank" in line
    (tmp_path / "broken.yaml").write_text("a: [")
    assert "broken.yaml" in error_line(["fit", "--config", config, "--config", str(tmp_path / "broken.yaml")])
    assert "missing.yaml" in error_line(["fit", "--config", config, "--config", str(tmp_path / "missing.yaml")])
    assert main(["fit", "--config", config, "--config", config, "--run", str(tmp_path / "run")]) == 0
