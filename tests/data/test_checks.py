"""Problems of opened volumes, with path and remedy."""

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, ornt_transform

from sammed3d_backbone.data.checks import label_problems, pair_problems
from sammed3d_backbone.data.volume import Volume

LABEL = Path("somewhere/label.nii.gz")


def labels_with(value):
    array = np.zeros((4, 4, 4))
    array[0, 0, 0] = value
    return array


@pytest.mark.parametrize(
    ("array", "remedy"),
    [
        (labels_with(1), None),
        (labels_with(9), r"values \[9\] are not declared \(\[0, 1\]\); add or correct"),
        (labels_with(-1), r"values \[-1\]"),
        (labels_with(0.5), "save them as integers"),
        (labels_with(np.nan), "save them as integers"),
        (np.ones((2, 4, 4, 4)), "save one integer volume"),
    ],
)
def test_a_label_volume_is_checked(array, remedy):
    problems = label_problems(LABEL, Volume(array, np.eye(4)), (0, 1))
    if remedy is None:
        assert problems == []
    else:
        (problem,) = problems
        assert problem.startswith(str(LABEL))
        assert re.search(remedy, problem)


def problems_of_pair(volume):
    return pair_problems(
        LABEL, volume, Path("image.nii.gz"), Volume(np.zeros((4, 4, 4)), np.eye(4))
    )


def test_a_grid_that_differs_in_the_fourth_decimal_is_the_same_grid():
    moved = np.eye(4)
    moved[0, 3] += 4e-4
    assert problems_of_pair(Volume(np.zeros((4, 4, 4)), moved)) == []


@pytest.mark.parametrize(
    ("volume", "remedy"),
    [
        (Volume(np.zeros((4, 4, 5)), np.eye(4)), r"image\.nii\.gz has \(4, 4, 4\); resample one"),
        (
            Volume(np.zeros((4, 4, 4)), np.diag([1.1, 1, 1, 1])),
            r"up to 0\.3 mm.*affine",
        ),
    ],
)
def test_volumes_on_two_grids_are_reported(volume, remedy):
    (problem,) = problems_of_pair(volume)
    assert re.search(remedy, problem)


@pytest.mark.parametrize("apart_vox", [0.1, 0.24, 0.26, 0.6])
@pytest.mark.parametrize("spacing_mm", [0.3, 4.0])
def test_the_tolerance_is_a_share_of_the_voxel(apart_vox, spacing_mm):
    affine = np.diag([spacing_mm] * 3 + [1.0])
    moved = affine.copy()
    moved[1, 3] = apart_vox * spacing_mm
    pair = [Volume(np.zeros((4, 4, 4)), each) for each in (moved, affine)]
    for tolerance in (0.25, 0.5):
        problems = pair_problems(LABEL, pair[0], LABEL, pair[1], tolerance=tolerance)
        assert bool(problems) == (apart_vox > tolerance)


@pytest.mark.parametrize("axes", ["LPS", "SAR", "RAI"])
def test_one_place_in_two_orders_of_voxels_does_not_ask_for_another_affine(axes):
    image = nib.Nifti1Image(np.zeros((4, 5, 6)), np.eye(4))
    turned = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes)))
    pair = [Volume(np.asanyarray(each.dataobj), each.affine) for each in (turned, image)]
    (problem,) = pair_problems(LABEL, pair[0], LABEL, pair[1])
    assert axes in problem
    assert "RAS" in problem
    assert "correct" not in problem
