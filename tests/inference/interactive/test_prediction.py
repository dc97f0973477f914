"""Results: volumes, probabilities, clicks that are enforced, masks that are merged."""

import numpy as np
import pytest
from standin import segment

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.inference.interactive.prediction import enforce_clicks
from sammed3d_backbone.inference.interactive.prompts import ClickPrompt
from sammed3d_backbone.inference.label_map import merge_masks

SHEARED = np.array([[0, 0, -2.0, 5], [-0.9, 0.3, 0, 1], [0.1, 2.4, 0.2, 2], [0, 0, 0, 1]])


def test_a_saved_mask_has_the_affine_and_header_of_its_source(tmp_path, predictor, balls):
    volume, *_ = balls
    affine = volume.affine.copy()
    affine[:3, 3] = [1 / 3, -7.1, 2.2]
    Volume(volume.array, affine).save(tmp_path / "scan.nii.gz")
    (found,) = segment(predictor, tmp_path / "scan.nii.gz", [(22, 40, 36)]).values()
    found.volume.save(tmp_path / "mask.nii.gz")
    scan, mask = Volume.load(tmp_path / "scan.nii.gz"), Volume.load(tmp_path / "mask.nii.gz")
    assert mask.affine.tobytes() == scan.affine.tobytes()
    assert np.array_equal(mask.array > 0, found.mask)


def test_the_mask_is_where_the_probability_exceeds_one_half(predictor, balls):
    (found,) = segment(predictor, balls[0], [(22, 40, 36)]).values()
    assert np.array_equal(found.probs() > 0.5, found.mask)


# --- enforced clicks ---------------------------------------------------------------------------


def test_clicks_win_over_the_network_on_request(model, balls):
    predictor = Predictor(model, enforce_clicks=True)
    predictor.set_volume(balls[0])
    clicks = [((22, 40, 36), True), ((60, 40, 36), True), ((24, 44, 36), False)]
    predictor.click(*clicks[0])
    predictor.click(*clicks[1])  # background: the stand-in finds nothing there
    found = predictor.predict()
    assert (found.clicks_agreed, found.clicks) == (1, 2)
    assert found.mask[22, 40, 36]
    assert found.mask[60, 40, 36]
    assert not found.probs()[60, 40, 36] > 0.5
    assert not found.mask[60, 48, 36]


@pytest.mark.parametrize("affine", [np.diag([1.5, 1.5, 1.5, 1]), SHEARED])
def test_every_click_is_enforced_and_nothing_far_from_it_changes(affine, rng):
    for _ in range(20):
        mask = rng.random((20, 21, 22)) > 0.5
        voxels = np.unique(rng.integers(0, 6, (12, 3)) + rng.integers(0, 14, 3), axis=0)
        clicks = [
            ClickPrompt("x", tuple(map(int, v)), bool(rng.random() > 0.5), None) for v in voxels
        ]
        changed = mask.copy()
        enforce_clicks(changed, clicks, Volume(mask.astype(np.uint8), affine))
        assert all(changed[c.point_vox] == c.positive for c in clicks)
        for voxel in np.argwhere(changed != mask):
            offsets = voxels - voxel
            assert np.linalg.norm(offsets @ affine[:3, :3].T, axis=1).min() <= 3.0


# --- merging -----------------------------------------------------------------------------------


@pytest.fixture
def overlapping(predictor, balls):
    """Three objects: the first ball, both balls, the second ball."""
    both = [(22, 40, 36), (36, 54, 36)]
    points = {"first": both[:1], "both": both, "second": both[1:]}
    return segment(predictor, balls[0], points)


def test_objects_that_do_not_overlap_need_no_rule(overlapping):
    overlapping.pop("both")
    labels, overlap = merge_masks(overlapping, "refuse")
    assert overlap == 0
    assert labels.array.dtype == np.uint8
    for value, name in enumerate(("first", "second"), start=1):
        assert np.array_equal(labels.array == value, overlapping[name].mask)


@pytest.mark.parametrize(("policy", "winner"), [("first", 1), ("last", 2)])
def test_the_rule_says_who_gets_a_disputed_voxel(overlapping, policy, winner):
    labels, overlap = merge_masks(overlapping, policy)
    assert labels.array[22, 40, 36] == winner
    assert overlap == int(overlapping["both"].mask.sum())


def test_the_likeliest_object_gets_a_disputed_voxel(overlapping):
    surer = overlapping["second"].logits.logits
    for start in surer:
        surer[start] = surer[start] * 2
    labels = merge_masks(overlapping, "likeliest")[0].array
    assert labels[36, 54, 36] == 3
    assert labels[22, 40, 36] == 1  # a tie: the earlier one
    assert labels[60, 40, 36] == 0


def test_overlap_is_refused_by_name(overlapping):
    with pytest.raises(ValueError, match="first, both, second"):
        merge_masks(overlapping, "refuse")
    with pytest.raises(ValueError, match="policy"):
        merge_masks(overlapping, "largest")
    with pytest.raises(ValueError, match="predictions"):
        merge_masks({}, "first")
