"""A second channel from the first."""

import json
import shutil

import numpy as np
import pytest
from sammed3d_backbone.recipes.studies.derive_channels import derive_channels

from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.volume import Volume


def test_the_second_channel_is_steep_where_the_first_changes(toy_data, two_channels):
    dataset = read_dataset(two_channels)
    assert dataset.channels == ("MRI", "gradient of MRI")
    assert [case.id for case in dataset.cases] == [case.id for case in read_dataset(toy_data).cases]
    image = Volume.load(two_channels / "imagesTr/case_0.nii.gz")
    assert np.array_equal(image.array[0], Volume.load(toy_data / "imagesTr/case_0.nii.gz").array)
    inside = Volume.load(two_channels / "labelsTr/case_0.nii.gz").array == 1
    first = np.flatnonzero(inside.any((1, 2)))[0]
    edge, middle = image.array[1, first, 8, 8], image.array[1, first + 3, 8, 8]
    assert edge > 2 * middle


def test_a_set_of_two_channels_is_refused(two_channels, tmp_path):
    with pytest.raises(ValueError, match="give a set of one"):
        derive_channels(two_channels, tmp_path)
    assert not (tmp_path / "dataset.json").exists()


def test_folds_come_along(toy_data, tmp_path):
    source = tmp_path / "with_folds"
    shutil.copytree(toy_data, source)
    (source / "splits.json").write_text(json.dumps({"folds": []}))
    derive_channels(source, tmp_path / "out")
    assert (tmp_path / "out/splits.json").read_text() == '{"folds": []}'
