"""Fixtures of all tests: real and small volumes, data-set folders, seeded random numbers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.provenance import cores

ROOT = Path(__file__).resolve().parent.parent
NO_DATA = "no test volumes in"


def pytest_configure():
    """Divides the cores among parallel workers."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        torch.set_num_threads(max(1, cores() // workers))


def pytest_terminal_summary(terminalreporter):
    """Reports the tests that were skipped because volumes are missing."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if NO_DATA in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} tests skipped for want of test volumes; set SAMMED3D_DATA to the "
            "folder that holds hippocampus/, headneck_ct/ and singles/",
            yellow=True,
        )


def pytest_runtest_setup(item):
    """Tests marked gpu run where there is one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real volumes, read-only."""
    folder = Path(os.environ.get("SAMMED3D_DATA", ROOT / "../shared/data")).resolve()
    if not (folder / "hippocampus" / "dataset.json").is_file():
        pytest.skip(
            f"{NO_DATA} {folder}; set SAMMED3D_DATA to the folder that holds "
            "hippocampus/, headneck_ct/ and singles/"
        )
    return folder


@pytest.fixture
def rng():
    """Random NumPy numbers, the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def generator():
    """Random torch numbers, the same in every run."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def write_volume(tmp_path):
    """Writes a volume; a seeded random image or the given array."""

    def write(path, array=None, *, affine=None, shape=(6, 7, 8), seed=0):
        if array is None:
            array = np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)
        Volume(array, np.eye(4) if affine is None else affine).save(tmp_path / path)
        return tmp_path / path

    return write


@pytest.fixture
def labels():
    """A label volume with two classes."""
    array = np.zeros((6, 7, 8), dtype=np.uint8)
    array[1:3, 2:5, 2:5] = 1
    array[3:5, 2:5, 2:5] = 2
    return array


@pytest.fixture
def decathlon(tmp_path, write_volume, labels):
    """A Decathlon folder of four cases; keyword arguments change its dataset.json."""

    def make(cases=4, **changes):
        names = [f"case_{i}" for i in range(cases)]
        for i, name in enumerate(names):
            write_volume(f"imagesTr/{name}.nii.gz", seed=i)
            write_volume(f"labelsTr/{name}.nii.gz", labels)
        info = {
            "name": "Toy",
            "modality": {"0": "MRI"},
            "labels": {"0": "background", "1": "head", "2": "tail"},
            "training": [
                {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
                for n in names
            ],
        }
        (tmp_path / "dataset.json").write_text(json.dumps(info | changes))
        return tmp_path

    return make


@pytest.fixture
def nnunet(tmp_path, write_volume, labels):
    """An nnU-Net 2 raw folder of three cases with two channels."""

    def make(**changes):
        for i in range(3):
            write_volume(f"labelsTr/case_{i}.nii.gz", labels)
            for channel in range(2):
                write_volume(f"imagesTr/case_{i}_{channel:04d}.nii.gz", seed=10 * i + channel)
        info = {
            "channel_names": {"0": "T1", "1": "FLAIR"},
            "labels": {"background": 0, "head": 1, "tail": 2},
            "numTraining": 3,
            "file_ending": ".nii.gz",
        }
        (tmp_path / "dataset.json").write_text(json.dumps(info | changes))
        return tmp_path

    return make


@pytest.fixture
def fine_tuned(tmp_path):
    """Writes a small model with random weights; keyword arguments change its card."""
    from sammed3d_backbone.data.preprocessing import Preprocessing
    from sammed3d_backbone.inference.card import Card
    from sammed3d_backbone.inference.segmenter import Segmenter, build_network

    def write(**changes):
        torch.manual_seed(0)
        values = {
            "network": "unetr",
            "encoder": {"variant": "tiny", "in_chans": 1, "img_size": 16},
            "adapter": {"feature_size": 4},
            "labels": {0: "background", 1: "head", 2: "tail"},
            "channels": ("MRI",),
            "preprocessing": Preprocessing(
                (2.0, 2.0, 2.0), {"default": "zscore_positive"}, "volume", (16, 16, 16)
            ),
        }
        card = Card(**values | changes)
        Segmenter(build_network(card), card).save(tmp_path / "model.safetensors")
        return str(tmp_path / "model.safetensors")

    return write
