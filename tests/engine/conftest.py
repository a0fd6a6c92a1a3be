"""An adapter folder as save_adapter() wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
from stored import build, trained

from vision_peft.engine.store import save_adapter


@pytest.fixture
def saved(tmp_path) -> Path:
    network = build()
    trained(network)
    return save_adapter(tmp_path / "adapter", network)
