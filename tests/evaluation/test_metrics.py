"""Dice and distances of surfaces, and what they mean where a structure is absent."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from sammed3d_backbone.evaluation.metrics import (
    dice_per_class,
    hausdorff95_mm,
    mean_of_known,
    surface_dice,
)


def line(values):
    return torch.tensor(values).reshape(-1, 1, 1)


def test_dice_is_twice_the_overlap_over_both_sizes():
    scores = dice_per_class(line([1, 1, 0, 2]), line([1, 0, 0, 2]), 3)
    assert scores == pytest.approx([2 / 3, 1.0])


@pytest.mark.parametrize(
    ("prediction", "label", "expected"),
    [([0, 0], [0, 0], math.nan), ([1, 0], [0, 0], 0.0), ([0, 0], [0, 1], 0.0), ([0, 1], [0, 1], 1)],
)
def test_absent_classes_score_as_written_down(prediction, label, expected):
    (score,) = dice_per_class(line(prediction), line(label), 2)
    assert score == pytest.approx(expected, nan_ok=True)


def test_dice_is_symmetric(generator):
    one, other = (torch.randint(0, 4, (5, 6, 7), generator=generator) for _ in range(2))
    assert dice_per_class(one, other, 4) == dice_per_class(other, one, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_the_integer_type_does_not_matter(dtype, generator):
    labels = torch.randint(0, 3, (4, 4, 4), generator=generator)
    assert dice_per_class(labels.to(dtype), labels, 3) == [1.0, 1.0]


def test_a_mean_leaves_out_what_was_not_asked():
    assert mean_of_known([1.0, math.nan, 0.5]) == 0.75
    assert math.isnan(mean_of_known([math.nan]))


def cube(first, *, side=6, shape=(20, 20, 20)):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(i, i + side) for i in first)] = True
    return mask


EMPTY = np.zeros((20, 20, 20), dtype=bool)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_distances_are_in_mm_along_the_axis_of_the_shift(axis):
    spacing_mm = (1, 2.5, 4)
    moved = np.roll(cube((5, 5, 5)), 3, axis)
    assert hausdorff95_mm(moved, cube((5, 5, 5)), spacing_mm) == 3 * spacing_mm[axis]


def test_hd95_is_the_same_from_both_sides():
    one, other = cube((3, 4, 5)), cube((6, 4, 2), side=9)
    assert hausdorff95_mm(one, other, (1, 2, 3)) == hausdorff95_mm(other, one, (1, 2, 3)) > 0


def test_a_speck_far_away_does_not_move_hd95_but_a_twentieth_of_the_surface_does():
    label = cube((2, 2, 2), side=10)
    prediction = label.copy()
    prediction[19, 19, 19] = True
    assert hausdorff95_mm(prediction, label, (1, 1, 1)) == 0
    prediction |= cube((14, 14, 14), side=5)
    assert hausdorff95_mm(prediction, label, (1, 1, 1)) > 5


def test_a_plate_that_is_off_by_the_tolerance_is_right():
    plate = np.zeros((8, 40, 40), dtype=bool)
    plate[3:5] = True
    moved = np.roll(plate, 1, axis=0)
    assert surface_dice(moved, plate, (2, 1, 1), tolerance_mm=2.0) == 1
    assert surface_dice(moved, plate, (2, 1, 1), tolerance_mm=1.9) < 0.2  # the rim is left


def test_equal_masks_have_no_distance_and_share_all_surface():
    mask = cube((0, 0, 0))  # touches the border of the volume
    assert surface_dice(mask, mask, (1, 1, 1), 0) == 1
    assert hausdorff95_mm(mask, mask, (1, 1, 1)) == 0


@pytest.mark.parametrize(
    ("prediction", "label", "nsd", "hd95"),
    [
        (EMPTY, EMPTY, math.nan, math.nan),
        (EMPTY, cube((1, 1, 1)), 0, math.inf),
        (cube((1, 1, 1)), EMPTY, 0, math.inf),
    ],
    ids=["neither", "missed", "invented"],
)
def test_an_absent_structure_scores_as_written_down(prediction, label, nsd, hd95):
    assert surface_dice(prediction, label, (1, 1, 1), 2) == pytest.approx(nsd, nan_ok=True)
    assert hausdorff95_mm(prediction, label, (1, 1, 1)) == pytest.approx(hd95, nan_ok=True)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's own
@pytest.mark.parametrize("touching", [False, True], ids=["inside", "at the border"])
def test_the_box_that_distances_are_computed_in_changes_nothing(rng, touching):
    low, high = (0, 12) if touching else (3, 9)
    masks = []
    for _ in range(2):
        mask = np.zeros((12, 14, 16), dtype=bool)
        mask[low:high, 2:high, 3:high] = rng.random((high - low, high - 2, high - 3)) < 0.7
        masks.append(mask)
    spacing_mm = (1.5, 0.8, 3.0)
    whole = [torch.from_numpy(np.pad(mask, 7))[None, None] for mask in masks]
    nsd = compute_surface_dice(
        *whole, [1.0], include_background=True, spacing=spacing_mm, use_subvoxels=True
    )
    hd95 = compute_hausdorff_distance(
        *whole, include_background=True, percentile=95, spacing=spacing_mm
    )
    assert surface_dice(*masks, spacing_mm, 1.0) == pytest.approx(float(nsd), abs=1e-6)
    assert hausdorff95_mm(*masks, spacing_mm) == pytest.approx(float(hd95), abs=1e-6)


@pytest.mark.parametrize("score", [surface_dice, hausdorff95_mm])
def test_masks_of_two_grids_are_refused(score):
    tolerance = (2.0,) if score is surface_dice else ()
    with pytest.raises(ValueError, match="bring both onto one grid"):
        score(EMPTY, EMPTY[1:], (1, 1, 1), *tolerance)


def test_a_class_that_was_not_looked_for_is_unknown():
    label = torch.zeros(4, 4, 4, dtype=torch.int64)
    label[:2] = 1
    prediction = label.clone()
    prediction[3] = 2
    annotated = torch.tensor([True, True, False])
    one, other = dice_per_class(prediction, label, 3, annotated)
    assert one == 1.0
    assert math.isnan(other)


def test_regions_overlap_and_ignored_voxels_count_for_nothing():
    label = torch.tensor([1, 1, 2, 2, 0, 3, 3]).reshape(7, 1, 1)
    prediction = torch.tensor([1, 2, 2, 0, 0, 1, 2]).reshape(7, 1, 1)
    whole, core = dice_per_class(prediction, label, 3, targets=[(1, 2), (2,)])
    assert whole == pytest.approx(2 * 3 / (3 + 4))
    assert core == pytest.approx(2 * 1 / (2 + 2))
