"""Every reported input is tried in a folder of its own."""

import pytest


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMMED3D_RUNS", str(tmp_path / "runs"))
    return tmp_path
