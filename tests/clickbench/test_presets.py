"""Every protocol against values computed by hand."""

from dataclasses import replace

import numpy as np
import pytest
from standins import Fixed, Sphere, box

from sammed3d_backbone.clickbench.bench import played
from sammed3d_backbone.clickbench.presets import RULES, rules_of
from sammed3d_backbone.clickbench.protocol import Player
from sammed3d_backbone.strategies import Draws

EVERY = [*RULES, "slicewise-2"]


def play(name, model, target, track=None, **changed):
    rules = replace(rules_of(name), **changed)
    lines, _, mask = played(Player(model), rules, target, track or next(iter(rules.tracks)))
    return lines, mask


@pytest.mark.parametrize("name", EVERY)
def test_every_protocol_plays_its_steps_twice_alike(name, cube):
    first, _ = play(name, Sphere(), cube(), steps=2)
    assert [line["step"] for line in first] == [1, 2]
    assert first == play(name, Sphere(), cube(), steps=2)[0]


@pytest.mark.parametrize("name", EVERY)
def test_what_takes_more_from_the_truth_than_clicks_is_an_oracle(name):
    honest = {"clickbench/1", "cvpr25", "cvpr25-xyz"}
    assert bool(rules_of(name).oracle) == (name not in honest)


def test_an_unknown_protocol_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"choose clickbench/1, .* or slicewise-N"):
        rules_of("slicewise-0")


@pytest.mark.parametrize(
    ("name", "steps", "tracks"),
    [
        ("clickbench/1", 10, ["centre", "random"]),
        ("sammed3d-2023", 10, ["deep"]),
        ("sammed3d-main", 1, ["random"]),
        ("cvpr25", 5, ["centre"]),
        ("cvpr25-xyz", 5, ["centre"]),
        ("slicewise-7", 7, ["random"]),
    ],
)
def test_a_protocol_has_its_budget_and_its_first_clicks(name, steps, tracks):
    assert (rules_of(name).steps, list(rules_of(name).tracks)) == (steps, tracks)


# --- clickbench/1 ------------------------------------------------------------------------------


def test_clickbench_starts_at_the_centre_or_anywhere(cube):
    target = cube()
    centre, _ = play("clickbench/1", Sphere(), target, "centre")
    anywhere, _ = play("clickbench/1", Sphere(), target, "random")
    assert centre[0]["clicks"][0]["vox"] == [4, 4, 4]  # the first of the 2 x 2 x 2 deepest
    drawn = Draws("made", "case", "cube", "first").below(64)
    assert anywhere[0]["clicks"][0]["vox"] == np.argwhere(target.truth)[drawn].tolist()


def test_clickbench_plays_ten_steps_that_may_fall(cube):
    # 64, 32 and no voxels of the cube: Dice 1 is carried no further than the object keeps it.
    target = cube()
    half = box(target.truth.shape, (3, 3, 3), (2, 4, 4))
    lines, _ = play("clickbench/1", Fixed(half, half * False), target)
    assert [line["dice"] for line in lines] == [pytest.approx(2 * 32 / 96, abs=1e-6), *[0] * 9]


@pytest.mark.parametrize(("side", "is_dropped"), [((3, 3, 3), False), ((2, 2, 6), True)])
def test_clickbench_drops_targets_below_27_voxels(cube, side, is_dropped):
    (line, *_), _ = play("clickbench/1", Sphere(), cube(side=side))
    assert ("dropped" in line) == is_dropped


# --- sammed3d-2023 -----------------------------------------------------------------------------


def test_2023_shows_128_voxels_around_the_label(cube):
    # At 1.5 mm, the cube from 3 to 6 has its middle at (3 + 7) // 2 = 5: the crop starts at
    # 5 - 64 = -59, and the cube lies at 62 to 65 of it.
    model, target = Sphere(), cube(spacing_mm=(1.5, 1.5, 1.5))
    lines, _ = play("sammed3d-2023", model, target, steps=1)
    assert model.volume.shape == (128, 128, 128)
    assert np.argwhere(model.volume.array > 0.5).min(0).tolist() == [62, 62, 62]
    assert np.argwhere(model.volume.array > 0.5).max(0).tolist() == [65, 65, 65]
    # In mm, clicks lie where the object is: 1.5 * 3 to 1.5 * 6.
    assert all(4.5 <= v <= 9 for v in lines[0]["clicks"][0]["mm"])


def test_2023_scores_inside_the_crop_only(cube):
    # A bar of 200 voxels along X: the crop, from 100 - 64 = 36 to 164, holds 128 of its 200.
    target = cube(start=(0, 3, 3), side=(200, 4, 4), shape=(200, 10, 10), spacing_mm=(1.5,) * 3)
    everything = np.zeros((128, 128, 128), bool)
    everything[:, 62:66, 62:66] = True
    lines, _ = play("sammed3d-2023", Fixed(everything), target, steps=1)
    assert lines[0]["dice"] == 1  # on the whole grid it would be 2 * 128 / 328


def test_2023_clicks_deep_twice_and_then_anywhere(cube):
    # Of a 5 x 5 x 5 cube, voxels deeper than half of 3 are the inner 3 x 3 x 3. An object that
    # never answers is clicked in them twice; later clicks may lie on any of the 125 voxels.
    target = cube(start=(2, 2, 2), side=5, spacing_mm=(1.5,) * 3)
    lines, _ = play("sammed3d-2023", Fixed(np.zeros((128,) * 3, bool)), target)
    # the cube's middle is voxel 4; (2 + 7) // 2 - 64 = -60, so that the middle is 64
    places = np.array([line["clicks"][0]["vox"] for line in lines]) - 64
    assert abs(places[:2]).max() <= 1
    assert abs(places[2:]).max() == 2


# --- sammed3d-main -----------------------------------------------------------------------------


def test_main_brings_the_mask_back_by_nearest_voxels(cube):
    # At 3 mm, the cube of 2 x 2 x 2 voxels from 4 to 5 becomes 4 x 4 x 4 of 1.5 mm from 8 to 11,
    # which lie at 62 to 65 of a crop that starts at (8 + 12) // 2 - 64 = -54. An answer with the
    # lower half along Z, 62 and 63, comes back: voxel 4 takes 2 * 4 + 1 + 54 = 63, which is in,
    # and voxel 5 takes 65, which is not. So 4 of 8 voxels are found: Dice 2 * 4 / (4 + 8).
    target = cube(start=(4, 4, 4), side=2, spacing_mm=(3.0, 3.0, 3.0))
    model = Fixed(box((128,) * 3, (62, 62, 62), (4, 4, 2)))
    (line,), mask = play("sammed3d-main", model, target)
    assert np.argwhere(mask.array).tolist() == [[4, 4, 4], [4, 5, 4], [5, 4, 4], [5, 5, 4]]
    assert line["dice"] == pytest.approx(2 / 3, abs=1e-6)
    assert mask.shape == target.image.shape


def test_main_scores_what_the_crop_did_not_reach(cube):
    # Of the bar of 200 voxels, 128 are in the crop, all found: Dice 2 * 128 / (128 + 200).
    target = cube(start=(0, 3, 3), side=(200, 4, 4), shape=(200, 10, 10), spacing_mm=(1.5,) * 3)
    found = np.zeros((128, 128, 128), bool)
    found[:, 62:66, 62:66] = True
    (line,), _ = play("sammed3d-main", Fixed(found), target)
    assert line["dice"] == pytest.approx(256 / 328, abs=1e-6)


def test_a_target_that_vanishes_at_the_crops_spacing_is_listed(cube):
    # At 0.1 mm, every 15th voxel is taken along each axis: 7, 22, ... miss voxel 3.
    target = cube(start=(3, 3, 3), side=1, spacing_mm=(0.1,) * 3, shape=(30, 30, 30))
    (line,), mask = play("sammed3d-main", Sphere(), target)
    assert line["dropped"] == "empty at the protocol's spacing"
    assert mask is None


# --- slicewise-N -------------------------------------------------------------------------------


def test_slicewise_clicks_every_slice_that_holds_the_object(cube):
    # 2 slices of 2 x 2 voxels; an object that finds its clicks only has 1, then 2 voxels per
    # slice: Dice 2 * 2 / (2 + 8), then 2 * 4 / (4 + 8).
    model = Sphere(0.1)
    lines, mask = play("slicewise-2", model, cube(start=(3, 4, 5), side=2))
    assert model.volumes == 2
    assert model.volume.shape == (10, 10, 1)
    assert [line["dice"] for line in lines] == [0.4, pytest.approx(2 / 3, abs=1e-6)]
    for line in lines:
        assert sorted(click["vox"][2] for click in line["clicks"]) == [5, 6]
    assert mask.array.sum() == 4


def test_slicewise_takes_axial_slices_of_any_storage(cube):
    target = cube(start=(3, 4, 5), side=2)
    target.image.affine[:3, :3] = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]  # axis 1 runs towards S
    model = Sphere(0.1)
    play("slicewise-1", model, target)
    assert model.volume.shape == (10, 1, 10)
    assert model.volume.affine[2, 3] == 5  # the last slice, of 4 and 5


# --- cvpr25 ------------------------------------------------------------------------------------


def test_cvpr25_repeats_its_click_for_an_object_that_does_not_answer(cube):
    # The 2 x 2 x 2 deepest voxels in the order of S, A, R; RandomState(42).choice(8) is 6, which
    # is S 1, A 1, R 0.
    assert np.random.RandomState(42).choice(8) == 6
    lines, _ = play("cvpr25", Fixed(np.zeros((10, 10, 10), bool)), cube())
    assert [line["clicks"][0]["vox"] for line in lines] == [[4, 5, 5]] * 5
