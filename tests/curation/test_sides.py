"""Left and right in names and in world coordinates, in every orientation."""

import nibabel as nib
import numpy as np
import pytest

from sammed3d_backbone.curation.rules import ClassMask
from sammed3d_backbone.curation.sides import (
    centre_mm,
    counterpart,
    is_pair,
    separations_mm,
    split,
)

ORIENTATIONS = ["RAS", "LPS", "LAS", "PIR", "ASL", "SRP"]


def stored_as(mask, codes):
    """A mask of axes R, A, S as a file of another orientation would hold it, and its affine."""
    image = nib.Nifti1Image(mask.astype(np.uint8), np.diag([2.0, 2.0, 3.0, 1.0]))
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    turned = image.as_reoriented(turn)
    return np.asarray(turned.dataobj) > 0, turned.affine


def pair():
    """Two kidneys, the left one larger and with a crumb beside it."""
    mask = np.zeros((40, 12, 20), bool)
    mask[4:10, 3:9, 4:16] = True
    mask[12, 4, 4] = True
    mask[30:35, 3:9, 4:16] = True
    return mask


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("kidney_left", "kidney_right"),
        ("RightParotid", "LeftParotid"),
        ("left lung", "right lung"),
        ("LEFT EYE", "RIGHT EYE"),
        ("liver", None),
        ("left and right kidney", None),
    ],
)
def test_a_side_in_a_name_has_a_counterpart(name, other):
    assert counterpart(name) == other


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kidneys", True),
        ("ParotidGlands", True),
        ("femoral_head", True),
        ("Hippocampus", True),
        ("kidney tumour", False),
        ("kidney_left", False),
        ("liver", False),
    ],
)
def test_only_the_whole_name_of_a_pair_is_one(name, expected):
    assert is_pair(name) == expected


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_a_pair_is_split_along_the_affine(codes):
    mask, affine = stored_as(pair(), codes)
    left, right = split(ClassMask.cropped("kidney", mask), affine)
    assert (left.name, right.name) == ("kidney left", "kidney right")
    assert int(left.mask.sum()) == 6 * 6 * 12 + 1  # the crumb is nearer to the left one
    assert int(right.mask.sum()) == 5 * 6 * 12
    assert centre_mm(left, affine)[0] < centre_mm(right, affine)[0]


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_the_right_one_of_a_pair_lies_towards_the_right(codes):
    mask, affine = stored_as(pair(), codes)
    left, right = split(ClassMask.cropped("kidney", mask), affine)
    x_mm = {
        "kidney_left": centre_mm(left, affine)[0],
        "kidney_right": centre_mm(right, affine)[0],
        "liver": 0.0,
        "RightParotid": 0.0,  # without a left one
    }
    found = separations_mm(x_mm)
    assert set(found) == {"kidney_left", "kidney_right"}
    assert found["kidney_left"] == found["kidney_right"] == pytest.approx(51, abs=0.2)
    swapped = {"kidney_left": x_mm["kidney_right"], "kidney_right": x_mm["kidney_left"]}
    assert separations_mm(swapped)["kidney_right"] == pytest.approx(-51, abs=0.2)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(pair()[:20], id="one kidney and a crumb"),
        pytest.param(np.ones((4, 4, 4), bool), id="one part"),
        pytest.param(pair().transpose(1, 0, 2), id="one before the other"),
    ],
)
def test_what_has_no_two_halves_side_by_side_stays_whole(mask):
    assert split(ClassMask.cropped("kidney", mask), np.eye(4)) is None
