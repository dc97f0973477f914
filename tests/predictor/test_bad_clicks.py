"""What a predictor refuses, and what it says; nothing that was said before is lost."""

import numpy as np
import pytest

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.predictor import Predictor

AFFINE = np.diag([1.5, 1.5, 1.5, 1.0])
GRID = np.arange(5 * 6 * 7, dtype=np.float32).reshape(5, 6, 7)


def with_one(value):
    array = GRID.copy()
    array[1, 2, 3] = value
    return array


VOLUMES = {
    "no affine": ((GRID,), TypeError, "give its affine"),
    "several channels": ((np.stack([GRID, GRID]), AFFINE), ValueError, r"give Volume\(volume.ar"),
    "two dimensions": ((GRID[0], AFFINE), ValueError, r"give \(X, Y, Z\)"),
    "no voxels": ((GRID[:0], AFFINE), ValueError, "give at least one"),
    "complex": ((GRID.astype(complex), AFFINE), TypeError, "give real numbers"),
    "yes and no": ((GRID > 3, AFFINE), TypeError, "give real numbers"),
    "text": ((GRID.astype(str), AFFINE), TypeError, "give real numbers"),
    "one NaN": ((with_one(np.nan), AFFINE), ValueError, "in 1 voxels; replace those voxels"),
    "one infinity": ((with_one(-np.inf), AFFINE), ValueError, "in 1 voxels; replace those voxels"),
    "constant": ((np.full_like(GRID, 7), AFFINE), ValueError, "all voxels are 7.*check the file"),
    "all zero": ((np.zeros_like(GRID), AFFINE), ValueError, "all voxels are 0.*check the file"),
    "singular affine": ((GRID, np.diag([1, 1, 0, 1.0])), ValueError, "mend the header"),
    "NaN affine": ((GRID, np.diag([1, 1, np.nan, 1])), ValueError, "mend the header"),
    "affine of 3 x 3": ((GRID, np.eye(3)), ValueError, "mend the header"),
    "metres": ((GRID, np.diag([0.0015, 0.0015, 0.0015, 1])), ValueError, "mend its affine"),
    "micrometres": ((GRID, np.diag([1500, 1500, 1500, 1.0])), ValueError, "mend its affine"),
    "missing file": (("no/such.nii.gz",), FileNotFoundError, "check the path"),
}


@pytest.mark.parametrize("case", VOLUMES)
def test_a_volume_that_cannot_be_used_is_refused_and_the_last_one_stays(predictor, balls, case):
    given, kind, said = VOLUMES[case]
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    with pytest.raises(kind, match=said):
        predictor.set_volume(*given)
    assert predictor.predict().mask.shape == balls[0].shape


def test_an_unknown_modality_is_refused(predictor):
    with pytest.raises(ValueError, match="give 'ct', 'mr', 'us' or None"):
        predictor.set_volume(GRID, AFFINE, modality="pet")


CLICKS = {
    "nothing": ({}, ValueError, r"give point_vox=\(i, j, k\) or point_mm"),
    "both": ({"point_vox": (1, 2, 3), "point_mm": (1, 2, 3)}, ValueError, "give point_vox"),
    "two numbers": ({"point_vox": (1, 2)}, ValueError, "give three finite numbers"),
    "NaN": ({"point_vox": (1, 2, np.nan)}, ValueError, "give three finite numbers"),
    "infinity in mm": ({"point_mm": (1, np.inf, 0)}, ValueError, "give three finite numbers"),
    "text": ({"point_vox": "1,2"}, TypeError, "is text; give three numbers"),
    "words": ({"point_vox": ("a", "b", "c")}, TypeError, "give three numbers"),
    "below": ({"point_vox": (-1, 2, 3)}, ValueError, r"run from \(0, 0, 0\) to \(89, 79, 69\)"),
    "above": ({"point_vox": (90, 2, 3)}, ValueError, r"run from \(0, 0, 0\) to \(89, 79, 69\)"),
    "huge": ({"point_vox": (1e300, 2, 3)}, ValueError, r"to \(89, 79, 69\)"),
    "outside in mm": (
        {"point_mm": (-1.0, 0, 0)},
        ValueError,
        r"from \(-0.8, -0.8, -0.8\) to \(134.2, 119.2, 104.2\)",
    ),
    "contradiction": (
        {"point_vox": (22, 40, 36), "positive": False},
        ValueError,
        "click 2 says that voxel .* is negative .*, click 1 that it is positive; undo one",
    ),
}


@pytest.mark.parametrize("case", CLICKS)
def test_a_click_that_cannot_be_meant_is_refused_and_the_others_stay(predictor, balls, case):
    given, kind, said = CLICKS[case]
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    before = predictor.predict().mask
    with pytest.raises(kind, match=said):
        predictor.click(**given)
    assert np.array_equal(predictor.predict().mask, before)


def test_a_click_may_contradict_another_objects(predictor, balls):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36), object="left")
    predictor.click((36, 54, 36), object="right")
    predictor.click((22, 40, 36), positive=False, object="right")
    assert predictor.predict("right").mask.any()


def test_a_click_is_the_voxel_that_it_lies_in(predictor, balls):
    predictor.set_volume(balls[0])
    predictor.click((22.4, 39.6, 36.0))
    with pytest.raises(ValueError, match=r"voxel \(22, 40, 36\) is negative"):
        predictor.click((22, 40, 36), False)


MASKS = {
    "nothing": ({}, ValueError, "give one of them"),
    "both": ({"mask": GRID > 0, "logits": GRID}, ValueError, "give one of them"),
    "other grid": ({"mask": np.ones((4, 6, 7))}, ValueError, "resample it"),
    "other place": ({"mask": Volume(GRID, 2 * AFFINE)}, ValueError, "resample it to the volume"),
    "empty": ({"mask": np.zeros((5, 6, 7))}, ValueError, "click on it instead"),
    "integers as logits": ({"logits": np.ones((5, 6, 7), int)}, TypeError, "pass it as mask="),
    "NaN": ({"logits": with_one(np.nan)}, ValueError, "replace those voxels"),
}


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_prompt_that_cannot_be_used_is_refused(predictor, case):
    given, kind, said = MASKS[case]
    predictor.set_volume(GRID, AFFINE)
    with pytest.raises(kind, match=said):
        predictor.mask_prompt(**given)
    assert predictor.objects == []


@pytest.mark.parametrize("call", ["click", "mask_prompt", "predict"])
def test_without_a_volume_there_is_nothing_to_do(predictor, call):
    with pytest.raises(ValueError, match="call set_volume first"):
        getattr(predictor, call)()


def test_without_a_positive_click_there_is_no_answer(predictor, balls):
    predictor.set_volume(balls[0])
    with pytest.raises(ValueError, match="call click first"):
        predictor.predict()
    predictor.click((22, 40, 36), False)
    with pytest.raises(ValueError, match="no positive click but negative ones; click inside it"):
        predictor.predict()
    with pytest.raises(ValueError, match="'liver' has no positive click; click inside it first"):
        predictor.predict("liver")
    with pytest.raises(ValueError, match="give at least one positive point"):
        predictor.segment(balls[0], [])


@pytest.mark.parametrize(
    ("knob", "said"),
    [
        ({"clicks": "last"}, "give 'newest', as in training, or 'all'"),
        ({"max_windows": 0}, "give the number of windows"),
        ({"spacing_mm": (1.5, 0, 1.5)}, "give three positive numbers"),
    ],
)
def test_knobs_have_ranges(model, balls, knob, said):
    with pytest.raises(ValueError, match=said):
        Predictor(model, **knob).set_volume(balls[0])


# --- odd, but not wrong ------------------------------------------------------------------------


def notes_of(array, point, **how):
    from standin import StandIn

    found = Predictor(StandIn(), spacing_mm=(1.5, 1.5, 1.5), follow=False).segment(
        array, [point], affine=AFFINE, **how
    )
    return " / ".join(found["object"].notes)


@pytest.mark.parametrize(
    ("array", "how", "said"),
    [
        (lambda a: np.where(a > 50, 800, -900), {}, "pass modality='ct'"),
        (lambda a: a, {"modality": "ct"}, "hardly HU; check the intercept"),
        (lambda a: a - 500.0, {}, "sees an empty image; shift the values"),
        (lambda a: a[:, :, 34:37], {}, "only 3 voxels thin"),
        (lambda a: a[:, :, 36:37], {}, "only 1 voxels thin"),
    ],
    ids=["HU without modality", "CT above 0", "nothing above 0", "three slices", "one slice"],
)
def test_an_odd_volume_is_segmented_with_a_note(balls, array, how, said):
    array = array(balls[0].array)
    assert said in notes_of(array, (22, 40, array.shape[2] // 2), **how)


def test_a_click_into_padding_is_allowed_with_a_note(balls):
    said = notes_of(balls[0].array, (5, 5, 5))
    assert "click (5, 5, 5) lies on the volume's lowest value" in said
    assert "the network finds nothing at these clicks" in said


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, ">i2", ">f4"])
def test_every_type_of_number_is_taken(balls, dtype):
    assert notes_of(balls[0].array.astype(dtype), (22, 40, 36)) == ""
