"""A bad configuration is answered with one line, before any weight or picture is read."""

from __future__ import annotations

import argparse

import pytest
import yaml
from tiny_settings import QUICKSTART, tiny_settings

from vision_peft.backbones.vit import Vit
from vision_peft.commands import run
from vision_peft.commands.config_errors import one_line, users_fault
from vision_peft.data.digits import Digits
from vision_peft.errors import UserError


@pytest.fixture(autouse=True)
def _nothing_is_read(monkeypatch):
    def refuse(self):
        raise AssertionError("weights or pictures were read")

    monkeypatch.setattr(Vit, "load", refuse)
    monkeypatch.setattr(Digits, "read", refuse)


WORDS = [
    ("--adapter.method LORA", ["adapter.method: 'LORA' is no Method", "did you mean LoRA?"]),
    ("--adapter.method torch.nn.Linear", ["adapter.method: 'torch.nn.Linear' is no Method", "BitFit"]),
    ("--adapter.method.rankk 4", ["adapter.method.rankk: no such key", "takes rank, alpha, scaling, dropout", "did you mean rank?"]),
    ("--adapter.method.rank x", ["adapter.method.rank: 'x' is not valid; expected int"]),
    ("--adapter.method.rank 5000", ["adapter.method.rank: 5000 does not fit vision.0.attn.q"]),
    ("--adapter.method.dropout 2", ["adapter.method.dropout: 2.0 is not in [0, 1)"]),
    ("--adapter.method.scaling sqrt", ["adapter.method.scaling: 'sqrt'", "rank or sqrt_rank", "did you mean sqrt_rank?"]),
    ("--adapter.targets vision.33.attn.q", ["'vision.33.attn.q' matches no layer", "did you mean vision.3.attn.q"]),
    ("--adapter.target qv", ["--adapter.target: no such option; did you mean --adapter.targets?"]),
    ("--model FewShot", ["model: 'FewShot' is no Task", "did you mean FewShotClassification?"]),
    ("--model.head_lrr 3", ["model.head_lrr: no such key", "did you mean head_lr?"]),
    ("--model.head LinearHed", ["model.head: 'LinearHed' is no Head", "did you mean LinearHead?"]),
    ("--model.optimizer.lrr 3", ["model.optimizer.lrr: no such key", "did you mean lr?"]),
    ("--model.optimizer.lr x", ["model.optimizer.lr: 'x' is not valid; expected float"]),
    ("--model.optimizer torch.optim.AdamWW", ["model.optimizer: 'torch.optim.AdamWW' is no Optimizer", "torch.optim.AdamW"]),
    ("--model.backbone vision_peft.backbones.Vi", ["model.backbone: 'vision_peft.backbones.Vi' is no Backbone", "backbones.Vit?"]),
    ("--model.backbone.name offline:dinov2", ["backbone 'offline:dinov2'", "did you mean offline:dinov2_vits14"]),
    ("--model.backbone.pool max", ["model.backbone.pool: 'max'", "default, avg, token or none"]),
    ("--data.source Digit", ["data.source: 'Digit' is no Source", "did you mean Digits?"]),
    ("--data.source ImageFolder", ["data.source: ImageFolder needs root"]),
    ("--data.source ImageFolder --data.source.root /nowhere", ["data.source.root: /nowhere does not exist"]),
    ("--data.augment flipp", ["data.augment: 'flipp'", "clip_lora, flip or none", "did you mean flip?"]),
    ("--data.shots 0", ["data.shots: must be at least 1"]),
    ("--trainer.max_stepss 3", ["trainer.max_stepss: no such key; did you mean trainer.max_steps?"]),
    ("--trainer.max_steps x", ["trainer.max_steps: 'x' is not valid; expected int"]),
    ("--trainer.precision bf17", ["trainer.precision: 'bf17'", "bf16-mixed", "did you mean bf16?"]),
    ("--trainer.accelerator gpuu", ["trainer:", "gpuu"]),
    ("--trainer.devices 0", ["trainer:", "devices"]),
    ("--trainer nofile", ["trainer: 'nofile' is neither a file nor a set of keys"]),
    ("--optimizer SGD", ["optimizer: no such key; did you mean model.optimizer?"]),
    ("--config nofile.yaml", ["nofile.yaml does not exist"]),
    ("positional", ["unexpected word 'positional'"]),
    ("--run", ["--run: expected one argument"]),
]


@pytest.mark.parametrize(("words", "parts"), WORDS, ids=[words for words, _ in WORDS])
def test_a_wrong_word_on_the_command_line(words, parts, error_line):
    line = error_line(["fit", "--config", QUICKSTART, *words.split()])
    for part in parts:
        assert part in line


def changed(path: str, value: object, drop: str | None = None) -> str:
    settings = node = tiny_settings()
    *parents, last = path.split("/")
    for parent in parents:
        node = node[parent]
    if drop:
        del node[drop]
    node[last] = value
    return yaml.safe_dump(settings)


FILES = [
    ("", ["bad.yaml: is empty"]),
    ("- 1\n- 2\n", ["bad.yaml: holds no keys with values"]),
    ("trainer:\n  max_steps: 3\n bad: [1,\n", ["bad.yaml, line 3", "not valid YAML"]),
    (changed("trainr", {"max_steps": 3}), ["bad.yaml: trainr: no such key; did you mean trainer?"]),
    (changed("trainer/max_stepss", 3), ["bad.yaml: trainer.max_stepss: no such key; did you mean trainer.max_steps?"]),
    (changed("adapter/target", "qv", drop="targets"), ["bad.yaml: adapter.target: no such key; did you mean adapter.targets?"]),
    (changed("adapter/method/init_args/rankk", 3), ["bad.yaml: adapter.method.rankk: no such key", "did you mean rank?"]),
    (changed("adapter/method/initargs", {"rank": 3}, drop="init_args"), ["bad.yaml: adapter.method.initargs", "did you mean init_args?"]),
    (changed("model/class_path", "FewShotClasification"), ["bad.yaml: model: 'FewShotClasification'", "mean FewShotClassification?"]),
    (changed("model/init_args/backbone/init_args/image_size", "big"), ["bad.yaml: model.backbone.image_size: 'big'", "int or null"]),
    (changed("model/init_args/optimizer/init_args/lrr", 1), ["bad.yaml: model.optimizer.lrr: no such key", "did you mean lr?"]),
]


@pytest.mark.parametrize(("text", "parts"), FILES, ids=[parts[0].removeprefix("bad.yaml: ") for _, parts in FILES])
def test_a_wrong_file(text, parts, error_line, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    line = error_line(["fit", "--config", str(path)])
    for part in parts:
        assert part in line


def test_of_several_files_the_one_with_the_mistake_is_named(config, error_line, tmp_path):
    path = tmp_path / "method.yaml"
    path.write_text("adapter: {method: {class_path: LoRA, init_args: {rank: many}}}")
    assert error_line(["fit", "--config", config, "--config", str(path)]).startswith(f"{path}: adapter.method.rank: 'many'")


def test_no_configuration_at_all(error_line):
    assert "lacks data, model: give --config FILE" in error_line(["fit"])
    assert "model: FewShotClassification needs backbone" in error_line(["fit", "--model", "FewShotClassification"])


def test_an_unknown_command(error_line):
    assert "did you mean fit" in error_line(["fitt", "--config", QUICKSTART])


def test_a_message_of_an_unknown_kind_is_passed_on_as_it_stands():
    assert one_line("something\n  new", []) == "something new"
    assert one_line('Parser key "model":\n  Problem with given class_path \'x.Y\':\n    new reason', []) == "model: new reason"


def test_a_user_error_inside_another_is_the_answer():
    try:
        try:
            raise UserError("the reason")
        except UserError as error:
            raise ValueError("wrapped") from error
    except ValueError as error:
        assert users_fault(error) and one_line(error, []) == "the reason"


def test_a_bug_keeps_its_traceback(monkeypatch):
    assert not users_fault(ValueError("a bug"))
    broken = argparse.ArgumentError(None, "model: invalid syntax")
    broken.__cause__ = SyntaxError("in our own file")
    assert not users_fault(broken)

    def bug(self, *args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr(Vit, "__init__", bug)
    with pytest.raises((TypeError, ValueError), match="a bug"):
        run.make_cli("fit", ["--config", QUICKSTART, "--model.backbone", "vision_peft.backbones.Vit"], run=False)
