"""Every limit, from both sides."""

import numpy as np
import pytest

from sammed3d_backbone.curation.rules import (
    PRESETS,
    ClassMask,
    CurationRules,
    preset,
    without_islands,
)
from sammed3d_backbone.data.volume import Volume

PLAIN = CurationRules(source="a test")


def grid(shape, spacing_mm=1.0):
    return Volume(np.broadcast_to(np.uint8(0), shape), np.diag([*[spacing_mm] * 3, 1.0]))


def boxed(shape):
    return ClassMask("box", np.ones(shape, bool), (1, 1, 1))


def hollow(voxels):
    """A connected target of so many voxels, the walls of a box of 15 voxels first."""
    indices = np.indices((15, 15, 15)).reshape(3, -1)
    mask = np.zeros((15, 15, 15), bool)
    mask[tuple(indices[:, np.argsort(indices.min(axis=0), kind="stable")[:voxels]])] = True
    return ClassMask("hollow", mask, (1, 1, 1))


def dots(*sizes):
    """A target of so many bars, one of each length."""
    mask = np.zeros((2 * len(sizes), 3, max(sizes)), bool)
    for number, size in enumerate(sizes):
        mask[2 * number, 1, :size] = True
    return ClassMask.cropped("bars", mask)


def test_a_target_is_kept_in_the_box_around_it_and_measured_there():
    mask = np.zeros((30, 30, 30), bool)
    mask[3:9, 4:5, 5:25] = True
    target = ClassMask.cropped("bar", mask)
    assert (target.start, target.mask.shape) == ((3, 4, 5), (6, 1, 20))
    extent = target.extent(Volume(np.broadcast_to(np.uint8(0), mask.shape), np.diag([1, 2, 3, 1])))
    assert extent.ml == pytest.approx(6 * 20 * 6 / 1000)
    assert extent.sides_mm == (6, 2, 60)
    assert extent.background == 1 - 120 / 27000
    assert np.array_equal(target.on(grid(mask.shape)).array, mask)


@pytest.mark.parametrize(
    ("voxels", "why"), [(990, "0.99 ml is less than 1 ml"), (1000, ""), (1010, "")]
)
def test_less_than_one_millilitre_is_too_small(voxels, why):
    assert PLAIN.small(hollow(voxels).extent(grid((20, 20, 20)))) == why


@pytest.mark.parametrize(("side_vox", "why"), [(7, "a side of 14 mm is less than 15 mm"), (8, "")])
@pytest.mark.parametrize("axis", range(3))
def test_a_side_of_less_than_fifteen_millimetres_is_too_small(axis, side_vox, why):
    shape = [12, 12, 12]
    shape[axis] = side_vox
    assert PLAIN.small(boxed(shape).extent(grid((20, 20, 20), 2.0))) == why


def test_a_limit_is_met_in_spite_of_the_rounding_of_a_header():
    spacing_mm = float(np.float32(1.4999999))
    assert PLAIN.small(boxed((10, 10, 10)).extent(grid((20, 20, 20), spacing_mm))) == ""


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((10, 11, 10), ""),  # 1100 of 100,000 voxels
        ((10, 10, 10), ""),
        ((9, 10, 10), "99.10% of the volume is background, more than 99%"),
    ],
)
def test_more_than_99_per_cent_of_background_is_out_in_the_paper_preset_only(shape, why):
    extent = boxed(shape).extent(grid((20, 50, 100), 2.0))
    assert PRESETS["paper"].sparse(extent) == why
    assert [PRESETS[name].sparse(extent) for name in ("default", "author-list")] == ["", ""]


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((10, 10, 10), ""),
        ((10, 10, 9), "3.04 ml is less than 3.375 ml"),
        ((121, 10, 10), ""),
        ((122, 10, 10), "a side of 183 mm is more than 181.5 mm"),
    ],
)
def test_the_authors_filter_counts_voxels_of_one_and_a_half_millimetres(shape, why):
    assert PRESETS["author-list"].small(boxed(shape).extent(grid((130, 20, 20), 1.5))) == why


@pytest.mark.parametrize(
    ("sizes", "kept", "parts", "beyond"),
    [((9, 8, 7, 6, 5), 35, 5, 0), ((9, 1, 8, 7, 6, 5), 35, 6, 1), ((5,) * 7, 25, 7, 2)],
)
def test_parts_beyond_the_five_largest_are_removed(sizes, kept, parts, beyond):
    cleaned, islands = without_islands(dots(*sizes), PLAIN)
    assert int(cleaned.mask.sum()) == kept
    assert (islands["parts"], islands["beyond"]) == (parts, beyond)
    assert (islands["did"] == "changed") == bool(beyond)


def test_of_equal_parts_the_first_stay():
    cleaned, _ = without_islands(dots(*(5,) * 7), PLAIN)
    assert cleaned.start == (0, 1, 0)
    assert cleaned.mask.shape == (9, 1, 5)


def test_voxels_that_share_a_corner_are_one_part():
    mask = np.zeros((7, 7, 7), bool)
    mask[range(7), range(7), range(7)] = True
    assert without_islands(ClassMask.cropped("diagonal", mask), PLAIN)[1]["parts"] == 1


@pytest.mark.parametrize(("sizes", "is_removed"), [((19,) * 5 + (5,), True), ((9,) * 9, False)])
def test_islands_that_hold_much_of_a_target_are_no_debris_by_default(sizes, is_removed):
    cleaned, islands = without_islands(dots(*sizes), PRESETS["default"])
    assert (islands["did"] == "changed") == is_removed
    assert int(cleaned.mask.sum()) == sum(sizes) - (5 if is_removed else 0)


def test_an_unknown_preset_names_those_that_exist():
    with pytest.raises(ValueError, match="choose one of default, paper, author-list"):
        preset("strict")
