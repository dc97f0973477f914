"""A data set and configurations with which recipes run in seconds."""

import pytest
import torch
from boxes import write_boxes
from sammed3d_backbone.recipes.studies.derive_channels import derive_channels


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """Six volumes of boxes, a front and a back, in the Decathlon's layout."""
    folder = tmp_path_factory.mktemp("toy")
    write_boxes(folder)
    return folder


@pytest.fixture(scope="session")
def two_channels(toy_data, tmp_path_factory):
    """The same volumes with their gradient as a second channel."""
    folder = tmp_path_factory.mktemp("toy_channels")
    derive_channels(toy_data, folder)
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder of runs, empty."""
    monkeypatch.setenv("SAMMED3D_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def small(toy_data, runs):
    """Arguments of a run of a few steps."""
    return {
        "name": "toy",
        "data": str(toy_data),
        "folds": 3,
        "scratch": True,
        "feature_size": 4,
        "spacing_mm": (1.0, 1.0, 1.0),
        "crop_vox": 16,
        "steps": 4,
        "validate_every": 2,
        "warmup_steps": 1,
        "threads": 1,
        "cpu": True,
    }


@pytest.fixture
def small_pretraining(toy_data, runs):
    """Arguments of a pretraining of a few steps; the threads that it sets are put back."""
    before = torch.get_num_threads()
    yield {
        "name": "toy",
        "sources": ("synthetic", str(toy_data)),
        "shares": (1, 1),
        "val_cases": 2,
        "val_crops": 2,
        "img_size": 16,
        "objects": 2,
        "interactions": 2,
        "smallest_vox": (100, 50),
        "structures": (3, 4),
        "curriculum_steps": 3,
        "steps": 4,
        "warmup_steps": 1,
        "validate_every": 2,
        "log_every": 1,
        "save_every_s": 0.0,
        "threads": 1,
        "cpu": True,
    }
    torch.set_num_threads(before)
