"""Click strategies, independent of a file's orientation."""

import itertools

import nibabel.orientations as orientations
import numpy as np
import pytest

from sammed3d_backbone.strategies import (
    Click,
    Draws,
    Errors,
    deep,
    deepest,
    joint_centre,
    largest_centre,
    uniform,
)

ORNTS = [
    np.array([*zip(axes, flips, strict=True)])
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]
STRATEGIES = [largest_centre, uniform, deep, deepest, joint_centre]


def box(shape, *boxes):
    """A mask that is true in boxes of (start, stop) per axis."""
    mask = np.zeros(shape, dtype=bool)
    for sides in boxes:
        mask[tuple(slice(*side) for side in sides)] = True
    return mask


def errors(truth, mask=None, *, spacing_mm=(1, 1, 1), clicked=(), name="a"):
    mask = np.zeros_like(truth) if mask is None else mask
    return Errors(truth, mask, np.diag([*spacing_mm, 1.0]), Draws(name), clicked)


# --- what every strategy promises --------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_click_lies_on_a_wrong_voxel_and_says_which_way(strategy, rng):
    truth, mask = (rng.random((7, 8, 9)) < 0.3 for _ in range(2))
    for name in range(20):
        click = strategy(errors(truth, mask, name=name))
        assert truth[click.point_vox] != mask[click.point_vox]
        assert click.positive == truth[click.point_vox]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_perfect_mask_gets_no_click(strategy, rng):
    truth = rng.random((5, 5, 5)) < 0.5
    assert strategy(errors(truth, truth)) is None


@pytest.mark.parametrize("strategy", [largest_centre, uniform, deep, deepest])
@pytest.mark.parametrize("ornt", ORNTS, ids=lambda ornt: "".join(orientations.ornt2axcodes(ornt)))
@pytest.mark.parametrize("turned", [0, 45], ids=["straight", "at 45 degrees"])
def test_the_storage_of_a_volume_moves_no_click(strategy, ornt, turned, rng):
    truth, mask = (rng.random((6, 7, 8)) < 0.4 for _ in range(2))
    c, s = np.cos(np.radians(turned)), np.sin(np.radians(turned))
    affine = np.array([[c, -2 * s, 0, 5], [s, 2 * c, 0, -3], [0, 0, 1.5, 2], [0, 0, 0, 1]])
    there = orientations.inv_ornt_aff(ornt, truth.shape)  # voxel stored anew -> voxel
    click = strategy(Errors(truth, mask, affine, Draws("x")))
    again = strategy(
        Errors(
            orientations.apply_orientation(truth, ornt),
            orientations.apply_orientation(mask, ornt),
            affine @ there,
            Draws("x"),
        )
    )
    assert tuple((there @ [*again.point_vox, 1])[:3]) == click.point_vox
    assert again.positive == click.positive


def test_masks_on_two_grids_are_refused():
    with pytest.raises(ValueError, match="resample the mask to the truth's"):
        errors(np.ones((2, 2, 2), bool), np.ones((2, 2, 3), bool))


def test_labels_are_no_masks():
    with pytest.raises(ValueError, match="compare with > 0"):
        errors(np.ones((2, 2, 2), np.uint8))


# --- random numbers ----------------------------------------------------------------------------


def test_draws_depend_on_names_alone():
    # Philox keyed with the first 16 bytes of sha256("set|case|liver|first"), as anybody can do.
    assert Draws("set", "case", "liver", "first").below(2**64) == 9389989387893413288
    assert Draws("set", "case", "liver", "second").below(2**64) != 9389989387893413288


def test_every_number_is_drawn_about_as_often():
    counts = np.bincount([Draws(i).below(5) for i in range(5000)], minlength=5)
    assert len(counts) == 5
    assert abs(counts - 1000).max() < 120  # four standard deviations


# --- largest centre ----------------------------------------------------------------------------


def test_the_first_click_is_the_centre_of_the_largest_part():
    # 5 x 5 x 5 voxels around (3, 3, 3) are more than 3 x 3 x 3 around (10, 10, 10).
    truth = box((13, 13, 13), [(1, 6)] * 3, [(9, 12)] * 3)
    assert largest_centre(errors(truth)) == Click((3, 3, 3), True)


def test_parts_that_touch_at_a_corner_are_one():
    # 8 + 8 voxels over a corner outweigh the 12 of the separate slab.
    truth = box((9, 9, 9), [(0, 2)] * 3, [(2, 4)] * 3, [(6, 9), (6, 8), (6, 8)])
    assert largest_centre(errors(truth)).point_vox == (0, 0, 0)


def test_depth_is_counted_in_millimetres():
    # Along Z, one voxel is 4 mm: a plate of 7 x 7 x 3 voxels is 7 x 7 x 12 mm, so that its middle
    # is 4 mm from X and Y borders and 8 mm from those of Z: all three layers are equally deep.
    truth = box((9, 9, 5), [(1, 8), (1, 8), (1, 4)])
    assert largest_centre(errors(truth, spacing_mm=(1, 1, 4))).point_vox == (4, 4, 1)
    assert largest_centre(errors(truth)).point_vox == (2, 2, 2)  # 2 mm deep, the first of them


def test_what_lies_outside_the_volume_is_not_of_the_object():
    # The object fills the array: its middle is deepest, not its border.
    assert largest_centre(errors(np.ones((5, 5, 5), bool))).point_vox == (2, 2, 2)


def test_missed_and_extra_voxels_are_taken_apart():
    # 8 missed and 12 extra voxels that touch: the extra ones are more, the click is negative.
    truth, mask = box((8, 4, 4), [(0, 2)] * 3), box((8, 4, 4), [(2, 5), (0, 2), (0, 2)])
    assert largest_centre(errors(truth, mask)) == Click((2, 0, 0), False)


def test_of_equally_large_errors_the_missed_one_comes_first():
    truth, mask = box((8, 2, 2), [(5, 7), (0, 2), (0, 2)]), box((8, 2, 2), [(0, 2)] * 3)
    assert largest_centre(errors(truth, mask)) == Click((5, 0, 0), True)


def test_of_equally_large_parts_the_first_comes_first():
    truth = box((9, 2, 2), [(0, 1), (1, 2), (1, 2)], [(4, 5), (0, 1), (0, 1)])
    assert largest_centre(errors(truth)).point_vox == (0, 1, 1)


def test_a_voxel_that_was_clicked_before_gives_way_to_the_next_best():
    truth = box((7, 3, 3), [(0, 5), (0, 3), (0, 3)], [(6, 7), (0, 1), (0, 1)])
    first = largest_centre(errors(truth))  # (1..3, 1, 1) are 2 mm deep
    assert first == Click((1, 1, 1), True)
    second = largest_centre(errors(truth, clicked=[first]))
    assert second == Click((2, 1, 1), True, is_repeat=True)


def test_a_clicked_component_gives_way_to_the_next_one():
    truth = box((7, 1, 1), [(0, 2), (0, 1), (0, 1)], [(6, 7), (0, 1), (0, 1)])
    clicked = [Click((0, 0, 0), True), Click((1, 0, 0), True)]
    click = largest_centre(errors(truth, clicked=clicked))
    assert click == Click((6, 0, 0), True, is_repeat=True)
    assert largest_centre(errors(truth, clicked=[*clicked, click])) is None


def test_a_click_of_the_other_label_does_not_count_as_a_repeat():
    truth = box((3, 3, 3), [(0, 3)] * 3)
    click = largest_centre(errors(truth, clicked=[Click((1, 1, 1), False)]))
    assert click == Click((1, 1, 1), True)


# --- the published strategies ------------------------------------------------------------------


def test_uniform_clicks_reach_every_wrong_voxel():
    truth, mask = box((4, 1, 1), [(0, 2), (0, 1), (0, 1)]), box((4, 1, 1), [(1, 4), (0, 1), (0, 1)])
    found = {uniform(errors(truth, mask, name=name)) for name in range(60)}
    assert found == {
        Click((0, 0, 0), True),
        Click((2, 0, 0), False),
        Click((3, 0, 0), False),
    }


def test_deep_clicks_stay_away_from_the_border():
    # Of 5 x 5 x 5 voxels, the middle is 3 deep; deeper than 1.5 are the inner 3 x 3 x 3.
    truth = box((9, 9, 9), [(2, 7)] * 3)
    found = {deep(errors(truth, name=name)).point_vox for name in range(400)}
    assert found == set(itertools.product(range(3, 6), repeat=3))


def test_deep_clicks_go_to_the_deeper_side():
    # The missed box is 2 deep, the extra one 1: only the missed one is clicked.
    truth, mask = box((9, 9, 9), [(0, 3)] * 3), box((9, 9, 9), [(5, 9), (5, 7), (5, 7)])
    assert {deep(errors(truth, mask, name=name)) for name in range(9)} == {Click((1, 1, 1), True)}


def test_deepest_clicks_go_to_the_deepest_voxels_of_the_deeper_side():
    # The missed bar is 2 deep along its middle line, the extra cube 2 deep in its middle.
    truth, mask = box((9, 9, 9), [(0, 6), (0, 3), (0, 3)]), box((9, 9, 9), [(6, 9)] * 3)
    found = {deepest(errors(truth, mask, name=name)) for name in range(60)}
    assert found == {Click((x, 1, 1), True) for x in range(1, 5)}
    assert deepest(errors(truth & False, mask)) == Click((7, 7, 7), False)


def test_joint_clicks_take_missed_and_extra_voxels_together():
    # 9 missed and 18 extra voxels touch: one component of 3 x 3 x 3, whose middle is extra. Apart,
    # the 20 voxels of the plate would be more than either.
    truth = box((12, 5, 5), [(1, 2), (1, 4), (1, 4)], [(6, 11), (1, 5), (2, 3)])
    mask = box((12, 5, 5), [(2, 4), (1, 4), (1, 4)])
    assert joint_centre(errors(truth, mask)) == Click((2, 2, 2), False)


def test_joint_clicks_break_ties_as_the_published_evaluator_does():
    # The 4 middle voxels of a bar are equally deep; RandomState(42).choice(4) is 2. Counted from
    # the last axis to the first, as S, A, R, the third one is (3, 1, 1).
    truth = box((6, 3, 3), [(0, 6), (0, 3), (0, 3)])
    assert np.random.RandomState(42).choice(4) == 2
    click = joint_centre(errors(truth))
    assert click == Click((3, 1, 1), True)
    assert joint_centre(errors(truth, clicked=[click])) == click


def test_joint_clicks_count_depth_in_voxels():
    truth = box((5, 5, 5), [(0, 5)] * 3)
    assert joint_centre(errors(truth, spacing_mm=(1, 1, 9))).point_vox == (2, 2, 2)
