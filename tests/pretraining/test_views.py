"""Geometry between two networks' views of a scan."""

import numpy as np
import pytest
import torch
from ramp import PLACE, RAMP, STUDENT, field

from sammed3d_backbone import Volume
from sammed3d_backbone.pretraining.views import (
    CropPlace,
    RawScan,
    Variation,
    draw_places,
    translated,
)


@pytest.mark.parametrize(("side_vox", "spacing_mm"), [(24, 0.75), (16, 1.0), (8, 2.5)])
@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (1.3, -0.8, -1.1)])
def test_a_click_is_at_the_same_place_of_the_scan_for_both_networks(side_vox, spacing_mm, factors):
    # The scan shows places in mm, so that equal intensities are equal places.
    place = CropPlace(PLACE.middle_vox, factors)
    other = field(side_vox, spacing_mm)
    ours, _ = RAMP.cut(place, STUDENT)
    theirs, _ = RAMP.cut(place, other)
    points = torch.tensor([[7, 8, 6], [5, 9, 10], [8, 8, 8]])
    moved = translated(points, STUDENT, other)
    seen = theirs[tuple(moved.T)] - ours[tuple(points.T)]
    assert seen.abs().max() <= 3 * max(1, spacing_mm) / 2 * max(map(abs, factors)) + 1e-4
    back = translated(moved, other, STUDENT)
    assert (back - points).abs().max() <= max(1, spacing_mm / 2)


def test_a_crop_has_its_middle_at_the_place_and_zeros_outside():
    crop, inside = RAMP.cut(PLACE, field(15, 1.0, tokens=1))
    assert crop[7, 7, 7] == RAMP.image[20, 15, 18]
    assert inside.all()
    crop, inside = RAMP.cut(CropPlace((0.0, 0.0, 0.0), PLACE.factors), STUDENT)
    assert not inside[:7].any()
    assert (crop[~inside] == 0).all()


def test_labels_follow_the_image():
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[6:14, 6:14, 6:14] = 3
    scan = RawScan.of(Volume(labels.astype(np.float32), np.eye(4)), Volume(labels, np.eye(4)))
    place = CropPlace((9.5, 9.5, 9.5), (0.5, 1.0, -0.75))
    image, _ = scan.cut(place, STUDENT)
    found = scan.cut_labels(place, STUDENT)
    assert torch.equal(found == 3, image > 1.5)


def test_the_first_places_do_not_depend_on_their_number():
    few, many = (
        draw_places(np.random.default_rng(0), RAMP, STUDENT, n, Variation(1.5, 1.1, (0.5,) * 3), 1)
        for n in (2, 5)
    )
    assert few == many[:2]
