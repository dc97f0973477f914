"""Small NIfTI files and data-set folders, in the layouts people have."""

import json

import numpy as np
import pytest

from sammed3d_backbone.data.volume import Volume


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
