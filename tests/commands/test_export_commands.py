"""check, export and merge on a tiny run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from vision_peft.cli import main
from vision_peft.commands import check, export
from vision_peft.commands.networks import on_random_input, rebuild
from vision_peft.engine.contract import Check
from vision_peft.engine.store import load_adapter


def bare(run_folder):
    backbone = rebuild(run_folder / "adapter", run_folder / "config.yaml")
    backbone.load()
    return backbone.eval()


@pytest.fixture
def expected(run_folder):
    """(function that runs a network, output of the adapted one, output of the bare one)."""
    backbone = bare(run_folder)
    run = on_random_input(backbone)
    with torch.no_grad():
        before = run(backbone.network)
        load_adapter(backbone.network, run_folder / "adapter", sites=backbone.sites(), resized=backbone.resized)
        return run, run(backbone.network), before


def test_random_weights_are_drawn_again_by_the_runs_seed(run_folder, expected):
    _, adapted, before = expected  # load_adapter compared the fingerprints
    assert (adapted - before).abs().max() > 1e-2


def test_another_seed_is_another_backbone(run_folder, tmp_path, error_line):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "seed_everything": 4}))
    assert "fingerprints differ" in error_line(["export", str(folder), "--to", "merged", "--output", str(tmp_path / "a.safetensors")])


def test_merged_file_loads_strictly_and_computes_the_same(run_folder, expected, tmp_path, capsys):
    file = tmp_path / "merged.safetensors"
    assert main(["export", str(run_folder), "--to", "merged", "--output", str(file)]) == 0
    assert "differs from the adapter by at most" in capsys.readouterr().out
    run, adapted, _ = expected
    network = bare(run_folder).network
    network.load_state_dict(load_file(file), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(run(network), adapted, rtol=0, atol=1e-5)


def test_merge_is_export_to_merged(run_folder, tmp_path):
    assert main(["merge", str(run_folder / "adapter"), "--output", str(tmp_path / "a.pt")]) == 0
    assert main(["export", str(run_folder), "--to", "merged", "--output", str(tmp_path / "b.pt")]) == 0
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pt", "b.pt"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_peft_folder_loads_in_peft(run_folder, expected, tmp_path):
    peft = pytest.importorskip("peft")
    folder = tmp_path / "peft"
    assert main(["export", str(run_folder), "--to", "peft", "--output", str(folder)]) == 0
    run, adapted, _ = expected
    network = bare(run_folder).network
    peft.PeftModel.from_pretrained(network, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(run(network), adapted, rtol=0, atol=1e-5)


def test_without_peft_the_export_says_that_it_was_not_compared(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert main(["export", str(run_folder), "--to", "peft", "--output", str(tmp_path / "peft")]) == 0
    assert "not compared, because the peft package is not installed" in capsys.readouterr().out


def test_adapter_folder_is_copied(run_folder, tmp_path):
    folder = tmp_path / "adapter"
    assert main(["export", str(run_folder), "--to", "adapter", "--output", str(folder)]) == 0
    for file in (run_folder / "adapter").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_an_existing_output_is_kept_unless_forced(run_folder, tmp_path, error_line):
    file = tmp_path / "merged.safetensors"
    file.write_text("precious")
    words = ["export", str(run_folder), "--to", "merged", "--output", str(file)]
    assert "exists already; --force replaces it" in error_line(words)
    assert file.read_text() == "precious"
    assert main([*words, "--force"]) == 0
    assert load_file(file)


@pytest.mark.parametrize("form", ["peft", "adapter", "merged"])
def test_force_replaces_no_folder_of_other_things(form, run_folder, tmp_path, error_line):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "letter.txt").write_text("precious")
    words = ["export", str(run_folder), "--to", form, "--output", str(folder), "--force"]
    assert "--force will not replace" in error_line(words)
    assert (folder / "letter.txt").read_text() == "precious"


def test_a_form_that_differs_is_not_written(run_folder, tmp_path, error_line, monkeypatch):
    def wrong(path, network):
        state = {key: value.clone() for key, value in network.state_dict().items()}  # the frozen weights, without the adapter
        save_file(state, path)

    monkeypatch.setattr(export, "save_merged", wrong)
    assert "differs from the adapter by" in error_line(["merge", str(run_folder), "--output", str(tmp_path / "a.safetensors")])
    assert not list(tmp_path.iterdir())


def test_an_adapter_folder_alone_is_enough_unless_its_backbone_is_random(run_folder, tmp_path, error_line):
    alone = tmp_path / "alone"
    shutil.copytree(run_folder / "adapter", alone)
    words = ["merge", str(alone), "--output", str(tmp_path / "a.safetensors")]
    assert "random weights (pretrained: false)" in error_line(words)

    weights = tmp_path / "test_vit.safetensors"  # the same weights as a file: now the folder says all that is needed
    save_file(bare(run_folder).network.state_dict(), weights)
    config = json.loads((alone / "adapter_config.json").read_text())
    config["backbone"] |= {"pretrained": True, "weights": str(weights)}
    (alone / "adapter_config.json").write_text(json.dumps(config))
    assert main(words) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "neither a run folder"), ("empty", "neither a run folder"), ("unfinished", "the run has no adapter at")],
)
def test_what_is_no_run(name, message, run_folder, tmp_path, error_line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    shutil.copy(run_folder / "config.yaml", tmp_path / "unfinished")
    assert message in error_line(["export", str(tmp_path / name), "--to", "peft", "--output", str(tmp_path / "out")])


def test_usage_errors_are_one_line_as_well(error_line):
    assert "argument --to: invalid choice: 'pef'" in error_line(["export", "x", "--to", "pef", "--output", "y"])


def test_check_of_a_vision_transformer(config, capsys):
    assert main(["check", "--config", config]) == 0
    text = capsys.readouterr().out
    assert "merged_equals_unmerged" in text and "FAILED" not in text and ", 0 failed" in text


def test_check_fails_with_exit_code_1(config, capsys, monkeypatch):
    monkeypatch.setattr(check, "run_contract", lambda *args, **kwargs: [Check("acts", True, ""), Check("trains", False, "no gradient")])
    assert main(["check", "--config", config]) == 1
    assert "FAILED  no gradient" in capsys.readouterr().out


def test_check_without_method(config, error_line):
    assert "no method to check" in error_line(["check", "--config", config, "--adapter.method", "null"])


@pytest.mark.filterwarnings("ignore:Clip .* random values")
def test_check_exercises_both_towers_of_clip(config, capsys, tmp_path):
    towers = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(towers))
    words = ["--model.backbone", "vision_peft.backbones.Clip", "--model.backbone.config", str(tmp_path / "tiny.json")]
    assert main(["check", "--config", config, *words]) == 0
    text = capsys.readouterr().out
    assert "on 4 sites of tiny" in text and ", 0 failed" in text


def test_a_dense_method_as_a_lora_of_chosen_rank(config, tmp_path, capsys, error_line):
    words = ["--adapter.method", "SVFit", "--run", str(tmp_path / "run")]
    assert main(["fit", "--config", config, *words]) == 0
    output = tmp_path / "peft"
    export = ["export", str(tmp_path / "run"), "--to", "peft", "--output", str(output)]
    assert "not a low-rank update" in error_line(export)
    capsys.readouterr()
    assert main([*export, "--rank", "4"]) == 0
    said = capsys.readouterr().out
    assert "as a LoRA of rank 4: the updates are off by" in said and "vision." in said
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 8  # q and v of a fused projection
    assert "goes with --to peft and --to diffusers only" in error_line([*export[:3], "merged", *export[4:], "--rank", "4"])


def test_import_takes_back_what_export_wrote_for_peft(config, run_folder, tmp_path, capsys, error_line, expected):
    run, adapted, _ = expected
    assert main(["export", str(run_folder), "--to", "peft", "--output", str(tmp_path / "peft")]) == 0
    words = ["import", str(tmp_path / "peft"), "--config", config, "--output", str(tmp_path / "own")]
    assert main(words) == 0
    assert "on 6 layers" in capsys.readouterr().out  # q and v of each block came back as one matrix
    backbone = bare(run_folder)
    load_adapter(backbone.network, tmp_path / "own", sites=backbone.sites(), resized=backbone.resized)
    torch.testing.assert_close(run(backbone.network), adapted, rtol=1e-5, atol=1e-5)
    assert "exists already" in error_line(words)
    assert "not a PEFT folder" in error_line(["import", str(run_folder / "adapter"), "--config", config, "--output", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
