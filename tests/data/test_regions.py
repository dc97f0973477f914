"""Regions of voxels."""

import numpy as np
import pytest

from sammed3d_backbone.data.regions import bounding_box, values_of


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_bounding_box_holds_all_voxels_and_no_smaller_one_does(rng, order):
    for count in (1, 2, 5):
        mask = np.zeros((7, 5, 9), dtype=bool, order=order)
        mask[tuple(rng.integers(0, mask.shape, (count, 3)).T)] = True
        for view in (mask, mask[::-1, :, ::-1], mask.transpose(2, 0, 1)):
            voxels = np.argwhere(view)
            box = bounding_box(view)
            assert [side.start for side in box] == voxels.min(0).tolist()
            assert [side.stop for side in box] == (voxels.max(0) + 1).tolist()


def test_an_empty_mask_has_no_bounding_box():
    assert bounding_box(np.zeros((3, 4, 5), dtype=bool)) is None


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint8])
def test_the_values_of_a_volume_are_found(dtype, rng):
    array = rng.integers(0, 7, (5, 6, 7)).astype(dtype)
    array[0, 0, 0] = 255
    assert np.array_equal(values_of(array), np.unique(array))
