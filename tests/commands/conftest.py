"""A tiny configuration, one run of it, and the command line in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_settings import tiny_settings

from vision_peft.cli import main


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_settings()))
    return str(path)


@pytest.fixture(scope="session")
def run_folder(config, tmp_path_factory) -> Path:
    """A finished run of the tiny configuration: two steps of LoRA on timm's test_vit with random weights."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["fit", "--config", config, "--run", str(folder)]) == 0
    return folder


@pytest.fixture
def error_line(capsys):
    """`error_line(argv)`: the one line that a mistake is answered with."""

    def run(argv: list[str]) -> str:
        capsys.readouterr()
        assert main(argv) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("vision-peft: error: ")
        return lines[0].removeprefix("vision-peft: error: ")

    return run
