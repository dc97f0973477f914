"""The scores of a step against values computed by hand."""

import math

import numpy as np
import pytest
from standins import Flickering, Sphere, box

from sammed3d_backbone.clickbench.protocol import ClickStep
from sammed3d_backbone.clickbench.scoring import score, slice_likeness

SHAPE = (12, 12, 12)


def step(mask, truth, spacing_mm=(1, 1, 1), agreement=(True,), agreement_all=(True,), affine=None):
    affine = np.diag([*spacing_mm, 1.0]) if affine is None else affine
    return ClickStep(mask, truth, affine, (), affine, agreement, agreement_all)


def test_a_cube_that_is_moved_by_one_voxel():
    # Two cubes of 4 x 4 x 4 share 3 x 4 x 4 = 48 of 64 voxels each.
    figures = score(step(box(SHAPE, (5, 4, 4), 4), box(SHAPE, (4, 4, 4), 4)))
    assert figures["dice"] == 0.75  # 2 * 48 / (64 + 64)
    assert figures["volume_error"] == 0
    assert figures["hd95_mm"] == 1  # 16 of each surface's 56 voxels are 1 mm off, the rest less
    assert figures["nsd_2mm"] == figures["nsd"] == 1  # nothing is further than 2 mm
    assert figures["tolerance_mm"] == 2
    assert figures["slices"] == [0, 0, 0]


def test_a_cube_that_is_too_long():
    # 4 x 4 x 7 instead of 4 x 4 x 4, and 3 mm per voxel along Z: 9 mm too long.
    figures = score(step(box(SHAPE, (4, 4, 4), (4, 4, 7)), box(SHAPE, (4, 4, 4), 4), (1, 1, 3)))
    assert figures["dice"] == pytest.approx(2 * 64 / (64 + 112), abs=1e-6)
    assert figures["volume_error"] == pytest.approx(112 / 64 - 1, abs=1e-6)
    assert figures["hd95_mm"] == 9  # the 16 voxels of the far end are more than 5 percent
    assert figures["tolerance_mm"] == 3
    assert figures["nsd_2mm"] < figures["nsd"] < 1


def test_an_empty_mask_scores_zero_and_the_diagonal():
    # 12 voxels of 1, 2 and 2 mm are 12, 24 and 24 mm: the diagonal is 36 mm.
    figures = score(step(np.zeros(SHAPE, bool), box(SHAPE, (4, 4, 4), 4), (1, 2, 2)))
    assert [figures[name] for name in ("dice", "nsd_2mm", "nsd")] == [0, 0, 0]
    assert figures["hd95_mm"] == 36
    assert figures["volume_error"] == -1
    assert figures["slices"] == [None, None, None]


def test_agreements_are_shares():
    figures = score(
        step(
            box(SHAPE, (4, 4, 4), 4),
            box(SHAPE, (4, 4, 4), 4),
            agreement=(True, False),
            agreement_all=(True, False, True, True),
        )
    )
    assert (figures["agreement"], figures["agreement_all"]) == (0.5, 0.75)


def test_equal_masks_have_equal_hashes():
    truth = box(SHAPE, (4, 4, 4), 4)
    one, other = score(step(truth, truth)), score(step(truth.copy(), truth))
    assert one["mask_sha256"] == other["mask_sha256"]
    assert score(step(~truth, truth))["mask_sha256"] != one["mask_sha256"]


def test_neighbouring_slices_are_compared_where_one_of_them_holds_something():
    # Slices of 0, 4, 4, 2 and 0 voxels; the 2 are among the 4. Pairs: 0, 1, 2 * 2 / 6, 0.
    mask = np.zeros((3, 3, 5), bool)
    mask[:2, :2, 1:3] = True
    mask[:2, 0, 3] = True
    assert slice_likeness(mask, 2) == pytest.approx((0 + 1 + 2 / 3 + 0) / 4)
    assert math.isnan(slice_likeness(np.zeros((3, 3, 3), bool), 0))


def test_a_mask_that_flickers_shows_along_its_axis(cube):
    # The truth's pairs along Z are 0, 1, 1, 1, 0: 3 / 5. Of every second slice, all pairs are 0.
    target = cube()
    mask = target.truth.copy()
    mask[:, :, ::2] = False
    figures = score(step(mask, target.truth))
    assert figures["slices"] == [0, 0, pytest.approx(-0.6)]


def test_slices_are_named_by_the_body_and_not_by_the_file():
    # Stored with axes towards S, R and A: the flicker along the first axis is along S.
    truth = box((10, 10, 10), (3, 3, 3), 4)
    mask = truth.copy()
    mask[::2] = False
    affine = np.array([[0, 1.0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    assert score(step(mask, truth, affine=affine))["slices"] == [0, 0, pytest.approx(-0.6)]


def test_a_slicewise_object_is_found_out(cube):
    target = cube(side=5, start=(2, 2, 2))
    steps = []
    for model in (Sphere(2.5), Flickering(2.5)):
        model.set_volume(target.image)
        model.reset()
        model.click((4, 4, 4) if isinstance(model, Sphere) else (4, 4, 3))
        steps.append(score(step(model.mask(), target.truth)))
    whole, flickering = (figures["slices"][2] for figures in steps)
    assert whole > -0.2
    assert flickering < -0.5
