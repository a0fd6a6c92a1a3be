"""The user's cache stays out of these tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VISION_PEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
