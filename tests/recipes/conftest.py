"""A data set and a configuration with which a recipe runs in seconds."""

import json

import numpy as np
import pytest

from sammed3d_backbone.data.volume import Volume


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """Six turned volumes with a bright front and a dim back, in the Decathlon's layout."""
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    affine = np.array([[0, 0, -1.0, 0], [-1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])  # PSL
    names = [f"case_{i}" for i in range(6)]
    for name in names:
        labels = np.zeros((22, 18, 17), np.uint8)
        start = rng.integers(3, 6)
        labels[start : start + 7, 5:12, 5:12] = 1
        labels[start + 7 : start + 13, 5:12, 5:12] = 2
        image = rng.normal(100, 5, labels.shape) + 60 * (labels == 1) + 30 * (labels == 2)
        Volume(image.astype(np.float32), affine).save(folder / f"imagesTr/{name}.nii.gz")
        Volume(labels, affine).save(folder / f"labelsTr/{name}.nii.gz")
    info = {
        "name": "Toy",
        "note": "made of boxes",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "front", "2": "back"},
        "training": [
            {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names
        ],
    }
    (folder / "dataset.json").write_text(json.dumps(info))
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
        "img_size": 16,
        "steps": 4,
        "validate_every": 2,
        "log_every": 1,
        "save_every_s": 0.0,
        "warmup_steps": 1,
        "threads": 1,
        "cpu": True,
    }
