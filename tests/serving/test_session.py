"""The session alone, against `Predictor`."""

import numpy as np
import pytest
import torch
from orientations import ORIENTATIONS, as_sent, expected, oriented

from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.serving import InteractiveSession
from sammed3d_backbone.serving.session import array_affine, hull

CLICKS = [((14, 16, 10), True), ((8, 10, 8), False), ((20, 24, 13), True)]


def click(session, voxel, positive=True, **options):
    return session.add_point_interaction(tuple(reversed(voxel)), positive, **options)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_masks_are_the_predictors_in_every_orientation(lopsided, scan, codes):
    volume, point = oriented(scan, codes, (14, 16, 10))
    session = InteractiveSession(Predictor(lopsided, enforce_clicks=True), axes=codes)
    image, properties = as_sent(volume)
    session.set_image(image, properties)
    target = np.zeros(image.shape[1:], np.uint8)
    session.set_target_buffer(target)
    click(session, point)
    assert target.any()
    assert np.array_equal(target, expected(lopsided, volume, (point, True)).T)


def test_wrong_axes_give_another_mask(lopsided, scan, session):
    click(session, (14, 16, 10))
    other = InteractiveSession(Predictor(lopsided, enforce_clicks=True), axes="SAR")
    image, properties = as_sent(scan)
    other.set_image(image, properties)
    other.set_target_buffer(np.zeros(image.shape[1:], np.uint8))
    click(other, (14, 16, 10))
    assert (other.target_buffer != session.target_buffer).any()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRA", "AIL"])
def test_an_affine_or_a_direction_wins_over_axes(scan, codes):
    volume, _ = oriented(scan, codes, (0, 0, 0))
    reverse = volume.affine[:, [2, 1, 0, 3]]  # array index k, j, i -> RAS+ mm
    assert np.array_equal(array_affine({"affine": reverse.tolist()}, "IPL"), reverse)
    spacing = volume.spacing_mm
    direction = np.diag([-1, -1, 1]) @ volume.affine[:3, :3] / spacing
    for form in (direction.ravel().tolist(), direction.tolist()):
        found = array_affine({"spacing": spacing[::-1], "direction": form}, "IPL")
        assert np.allclose(found[:3, :3], reverse[:3, :3])


def test_every_click_writes_the_changed_box_only(lopsided, scan, session):
    shown = session.target_buffer.copy()
    for count in range(1, len(CLICKS) + 1):
        box = click(session, *CLICKS[count - 1])
        mask = expected(lopsided, scan, *CLICKS[:count]).T
        assert np.array_equal(session.target_buffer, mask)
        assert box == hull(mask != shown.astype(bool)) == session._last_paste_bbox
        shown = session.target_buffer.copy()


def test_undo_goes_back_to_the_first_click(session):
    states = [session.target_buffer.copy()]
    for voxel, positive in CLICKS:
        click(session, voxel, positive)
        states.append(session.target_buffer.copy())
    for before in reversed(states[:-1]):
        assert session.undo() is True
        assert np.array_equal(session.target_buffer, before)
    assert session.undo() is False
    assert session._last_paste_bbox is None


def test_what_is_clicked_after_undo_is_as_if_the_undone_had_never_been(lopsided, scan, session):
    for voxel, positive in CLICKS:
        click(session, voxel, positive)
    session.undo()
    session.undo()
    click(session, *CLICKS[2])
    mask = expected(lopsided, scan, CLICKS[0], CLICKS[2]).T
    assert np.array_equal(session.target_buffer, mask)


def test_prompts_without_prediction_are_answered_by_the_next_one(lopsided, scan, session):
    for voxel, positive in CLICKS:
        assert click(session, voxel, positive, run_prediction=False) is None
    assert not session.target_buffer.any()
    assert session._predict() is not None
    assert np.array_equal(session.target_buffer, expected(lopsided, scan, *CLICKS).T)
    assert session.undo() is True
    assert not session.target_buffer.any()
    session._predict()
    assert np.array_equal(session.target_buffer, expected(lopsided, scan, *CLICKS[:2]).T)


def test_a_negative_click_first_is_remembered(lopsided, scan, session):
    assert click(session, (8, 10, 8), False) is None
    assert not session.target_buffer.any()
    click(session, (14, 16, 10))
    mask = expected(lopsided, scan, ((8, 10, 8), False), ((14, 16, 10), True)).T
    assert np.array_equal(session.target_buffer, mask)


def test_of_two_contradicting_clicks_the_newest_counts(lopsided, scan, session):
    for positive in (True, False):
        click(session, (14, 16, 10), positive)
    assert not session.target_buffer.any()
    click(session, (14, 16, 10))
    mask = expected(lopsided, scan, ((14, 16, 10), True)).T
    assert np.array_equal(session.target_buffer, mask)


def test_fractions_are_rounded_and_the_border_is_a_voxel_wide(session):
    d0 = session.target_buffer.shape[0]
    session.add_point_interaction((d0 - 0.4, 16.3, 14.4), True)
    assert session._prompts[-1].voxel == (d0 - 1, 16, 14)
    session.add_point_interaction((-1.0, 16, 14), False)
    assert session._prompts[-1].voxel == (0, 16, 14)
    before = session.target_buffer.copy()
    assert session.add_point_interaction((d0 + 0.1, 16, 14), True) is None
    assert np.array_equal(session.target_buffer, before)
    assert len(session._prompts) == 2
    assert session.undo() is True  # the viewer has a mark to take back
    assert len(session._prompts) == 2


@pytest.mark.parametrize(
    "coordinates", [(1, 2), (1, 2, float("nan")), ("a", 2, 3), None, [[1, 2, 3]] * 2, 10**400]
)
def test_what_is_not_a_point_is_refused(session, coordinates):
    with pytest.raises(ValueError, match="coordinates"):
        session.add_point_interaction(coordinates, True)
    assert session.undo() is False


def test_the_next_object_needs_no_encoder(lopsided, session):
    click(session, (14, 16, 10))
    passes = lopsided.image_encoder.passes
    session.reset_interactions()
    assert not session.target_buffer.any()
    assert session.undo() is False
    click(session, (26, 4, 18))
    assert session.target_buffer.any()
    assert lopsided.image_encoder.passes == passes


def test_a_mask_to_start_from(lopsided, scan, session):
    click(session, (26, 4, 18))
    seed = np.zeros(session.target_buffer.shape, np.uint8)
    seed[7:14, 9:25, 7:20] = 1
    before = session.target_buffer.copy()
    assert session.add_initial_seg_interaction(seed) is None
    assert np.array_equal(session.target_buffer, seed)
    click(session, (8, 10, 8), False)
    predictor = Predictor(lopsided, enforce_clicks=True)
    predictor.set_volume(scan)
    predictor.mask_prompt(mask=seed.T)
    predictor.click((8, 10, 8), False)
    assert np.array_equal(session.target_buffer, predictor.predict().mask.T)
    session.undo()
    assert np.array_equal(session.target_buffer, seed)
    session.undo()
    assert np.array_equal(session.target_buffer, before)


def test_a_mask_may_be_refined_at_once_and_that_is_one_step(session):
    seed = np.zeros(session.target_buffer.shape, np.uint8)
    seed[7:14, 9:25, 7:20] = 1
    assert session.add_initial_seg_interaction(seed, run_prediction=True) is not None
    assert session.undo() is True
    assert not session.target_buffer.any()
    assert session._last_paste_bbox is not None


def test_an_empty_mask_is_a_reset(session):
    click(session, (14, 16, 10))
    session.add_initial_seg_interaction(np.zeros(session.target_buffer.shape, np.uint8))
    assert not session.target_buffer.any()
    assert session._prompts == ()


def test_the_target_may_be_a_tensor(session):
    click(session, (14, 16, 10))
    shown = session.target_buffer
    target = torch.zeros(shown.shape, dtype=torch.int16)
    session.set_target_buffer(target)
    session._predict()
    assert np.array_equal(target.numpy(), shown)


def test_a_prompt_that_fails_is_forgotten(session, monkeypatch):
    def fail():
        raise MemoryError

    monkeypatch.setattr(session._predictor, "predict", fail)
    with pytest.raises(MemoryError):
        click(session, (14, 16, 10))
    assert session._prompts == ()
    assert session.undo() is False


def test_a_new_image_forgets_everything(scan, session):
    click(session, (14, 16, 10))
    session.set_image(*as_sent(scan))
    assert session.target_buffer is None
    assert session.undo() is False
    assert click(session, (14, 16, 10)) is None  # there is nothing to write to
    with pytest.raises(ValueError, match="target buffer"):
        session.set_target_buffer(np.zeros((2, 2, 2), np.uint8))


@pytest.mark.parametrize(
    ("image", "properties", "token"),
    [
        (np.zeros((2, 4, 4, 4)), {}, "channel"),
        (np.zeros((4, 4, 4)), {}, "channel"),
        (np.zeros((1, 4, 4, 4)), {}, "all voxels"),
        (np.arange(64.0).reshape(1, 4, 4, 4), {"spacing": [1, 2]}, "spacing"),
        (np.arange(64.0).reshape(1, 4, 4, 4), {"spacing": [1, 2, 0]}, "spacing"),
        (np.arange(64.0).reshape(1, 4, 4, 4), {"spacing": [1, 2, 1e9]}, "spacing"),
        (np.arange(64.0).reshape(1, 4, 4, 4), {"affine": [1, 2]}, "affine"),
        (np.arange(64.0).reshape(1, 4, 4, 4), {"direction": [0] * 9}, "affine"),
        (np.arange(64.0).reshape(1, 4, 4, 4), {"direction": "abc"}, "direction"),
    ],
)
def test_images_that_cannot_be_used_are_refused(session, image, properties, token):
    with pytest.raises(ValueError, match=token):
        session.set_image(image, properties)


@pytest.mark.parametrize("axes", ["LP", "LLS", "RLS", "XYZ", "", "LPSR"])
def test_axes_are_three_directions(lopsided, axes):
    with pytest.raises(ValueError, match="axes"):
        InteractiveSession(Predictor(lopsided), axes=axes)


def test_nothing_can_be_done_before_there_is_an_image(lopsided):
    session = InteractiveSession(Predictor(lopsided))
    with pytest.raises(ValueError, match="set_image"):
        session.add_point_interaction((1, 2, 3), True)
    assert session.undo() is False
    session.reset_interactions()
    with pytest.warns(RuntimeWarning, match="predictor"):
        session.initialize_from_trained_model_folder("anywhere")


def test_following_is_switched_without_losing_prompts(lopsided, scan, session):
    click(session, (14, 16, 10))
    session.set_do_autozoom(False)
    assert session.do_autozoom is False
    session._predict()
    mask = expected(lopsided, scan, *CLICKS[:1], follow=False).T
    assert np.array_equal(session.target_buffer, mask)
