"""Clicks in, masks on the caller's grid out."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage
from standin import StandIn, segment

from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.inference.interactive.propagation import ObjectState, WindowPrediction
from sammed3d_backbone.loading.calibration import DiceCalibration
from sammed3d_backbone.loading.registry import Weights


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


# --- the answer --------------------------------------------------------------------------------


def test_a_click_finds_what_was_clicked(predictor, balls):
    volume, first, second = balls
    predictor.set_volume(volume)
    predictor.click((22, 40, 36))
    found = predictor.predict()
    assert dice(found.mask, first) > 0.9
    assert not (found.mask & second).any()
    assert (found.clicks, found.clicks_agreed, found.windows) == (1, 1, 1)


def test_the_mask_lies_on_the_callers_grid_with_its_affine(predictor, rng):
    affine = np.array([[0, 0, -2.0, 5], [-0.9, 0.1, 0, 1 / 3], [0.1, 2.4, 0, 2], [0, 0, 0, 1]])
    array = rng.integers(0, 100, (60, 21, 30)).astype(np.int16)
    predictor.set_volume(array, affine)
    predictor.click((30, 10, 15))
    volume = predictor.predict().volume
    assert volume.shape == (60, 21, 30)
    assert volume.affine.tobytes() == affine.tobytes()


def test_a_second_click_costs_no_encoding_and_goes_on_from_the_first(predictor, model, balls):
    volume, first, second = balls
    predictor.set_volume(volume)
    predictor.click((22, 40, 36), True)
    predictor.predict()
    predictor.click((36, 54, 36), True)
    assert dice(predictor.predict().mask, first | second) > 0.9
    predictor.click((36, 54, 36), positive=True)
    predictor.click((22, 41, 36), False)
    assert dice(predictor.predict().mask, second) > 0.9
    assert model.image_encoder.passes == 1


def test_the_first_pass_gets_a_zero_mask_and_later_ones_the_logits(predictor, model, balls):
    predictor.set_volume(balls[0])
    for point in [(22, 40, 36), (36, 54, 36)]:
        predictor.click(point)
    predictor.predict()
    (first, zeros), (second, logits) = model.prompt_encoder.told
    assert not zeros.any()
    assert (logits > 0).any()
    assert (logits < 0).any()
    assert first[0].shape == second[0].shape == (1, 1, 3)


def test_all_clicks_are_told_on_request(model, balls):
    predictor = Predictor(model, clicks="all")
    predictor.set_volume(balls[0])
    for point in [(22, 40, 36), (36, 54, 36)]:
        predictor.click(point)
    predictor.click((33, 40, 36), False)
    predictor.predict()
    points, labels = model.prompt_encoder.told[-1][0]
    assert points.shape == (1, 3, 3)
    assert labels.tolist() == [[1, 1, 0]]


@pytest.mark.parametrize(
    ("trained", "given", "used"),
    [("all", None, "all"), ("all", "newest", "newest"), (None, None, "newest")],
)
def test_clicks_are_given_as_the_weights_were_trained(model, trained, given, used):
    model.pretrained_cfg = Weights(name="ours", clicks=trained)
    assert Predictor(model, clicks=given).clicks == used


def test_asking_in_between_changes_nothing(model, balls):
    clicks = [((22, 40, 36), True), ((36, 54, 36), True), ((36, 56, 36), False)]
    often, once = Predictor(model), Predictor(model)
    for predictor in (often, once):
        predictor.set_volume(balls[0])
        for point, positive in clicks:
            predictor.click(point, positive)
            if predictor is often:
                predictor.predict()
    assert np.array_equal(often.predict().mask, once.predict().mask)


def test_undo_goes_back_to_the_beginning(predictor, model, balls):
    predictor.set_volume(balls[0])
    masks = []
    for point, positive in [((22, 40, 36), True), ((36, 54, 36), True), ((22, 41, 36), False)]:
        predictor.click(point, positive)
        masks.append(predictor.predict().mask)
    passes = model.mask_decoder.passes
    for mask in masks[-2::-1]:
        predictor.undo()
        assert np.array_equal(predictor.predict().mask, mask)
    assert model.mask_decoder.passes == passes
    predictor.undo()
    with pytest.raises(ValueError, match="undo"):
        predictor.undo()


def test_reset_forgets_clicks_and_keeps_the_encoded_window(predictor, model, balls):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    before = predictor.predict().mask
    predictor.reset()
    assert predictor.objects == []
    predictor.click((22, 40, 36))
    assert np.array_equal(predictor.predict().mask, before)
    assert model.image_encoder.passes == 1


def test_another_volume_forgets_clicks_and_windows(predictor, model, balls):
    for _ in range(2):
        predictor.set_volume(balls[0])
        assert predictor.objects == []
        predictor.click((22, 40, 36))
        predictor.predict()
    assert model.image_encoder.passes == 2


def test_many_objects_share_the_encoder_pass(predictor, model, balls):
    volume, first, second = balls
    found = segment(predictor, volume, {"left": [(22, 40, 36)], "right": [(36, 54, 36)]})
    assert dice(found["left"].mask, first) > 0.9
    assert dice(found["right"].mask, second) > 0.9
    assert model.image_encoder.passes == 1
    with pytest.raises(ValueError, match="left, right"):
        predictor.predict()


def test_the_memory_of_windows_has_a_bound(model, balls):
    predictor = Predictor(model, cache_bytes=1, follow=False)
    predictor.set_volume(Volume(np.tile(balls[0].array, (3, 1, 1)), balls[0].affine))
    for point in [(22, 40, 36), (240, 40, 36), (22, 40, 35)]:
        predictor.click(point)
    predictor.predict()
    assert model.image_encoder.passes == 3


def test_the_spacing_is_that_of_the_preprocessing(model, balls):
    predictor = Predictor(model, preprocessing=replace(SAM_MED3D, spacing_mm=(3.0, 3.0, 3.0)))
    predictor.set_volume(np.where(balls[1], 200, 50), balls[0].affine)
    predictor.click((22, 40, 36))
    found = predictor.predict()
    assert dice(found.mask, balls[1]) > 0.85
    assert not found.notes


def trained_with(model, preprocessing):
    """The network with a record of weights."""
    model.pretrained_cfg = SimpleNamespace(preprocessing=preprocessing)
    return model


def test_preprocessing_is_that_of_the_weights_or_assumed_or_overridden_and_said(model, balls):
    def notes(**how):
        (found,) = segment(Predictor(model, **how), balls[0], [(22, 40, 36)]).values()
        return " ".join(found.notes)

    assert "SAM-Med3D" in notes()
    assert notes(preprocessing=SAM_MED3D) == ""
    trained_with(model, SAM_MED3D)
    assert notes() == ""
    assert "statistics=volume" in notes(preprocessing=replace(SAM_MED3D, statistics="volume"))


def test_networks_that_differ_in_statistics_alone_see_different_windows(balls):
    """What lies outside a window changes the network's input by the volume's statistics only."""
    volume, *_ = balls
    larger = np.concatenate([volume.array, 10 * volume.array])  # brighter beyond the window
    seen = {}
    for statistics in ("crop", "volume"):
        model = trained_with(StandIn(), replace(SAM_MED3D, statistics=statistics))
        model.image_encoder.register_forward_hook(
            lambda module, given, result, key=statistics: seen.setdefault(key, []).append(given[0])
        )
        for array in (volume.array, larger):
            segment(Predictor(model, follow=False), array, [(22, 40, 36)], affine=volume.affine)
    assert torch.equal(*seen["crop"])
    assert (seen["volume"][0] - seen["volume"][1]).abs().mean() > 0.1
    assert not torch.allclose(seen["crop"][0], seen["volume"][0])


@pytest.mark.parametrize(("modality", "clamped"), [("ct", True), (None, False), ("mr", False)])
def test_ct_is_clamped_as_in_training(predictor, balls, modality, clamped):
    seen = []
    predictor._network.model.image_encoder.register_forward_hook(
        lambda module, given, result: seen.append(given[0])
    )
    for top in (1500, 3000):
        array = np.where(balls[1], top, balls[0].array).astype(np.int16)
        segment(predictor, array, [(22, 40, 36)], affine=balls[0].affine, modality=modality)
    assert torch.equal(seen[0], seen[1]) == clamped


# --- places ------------------------------------------------------------------------------------

ORIENTATIONS = [
    (order, flips)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def stored(volume, order, flips):
    """The same volume with another order and direction of its axes, and the way a voxel goes."""
    turned = volume.array.transpose(order)[tuple(slice(None, None, f) for f in flips)]
    to_old = np.zeros((4, 4))
    to_old[3, 3] = 1
    for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
        to_old[old, new] = flip
        to_old[old, 3] = 0 if flip > 0 else volume.shape[old] - 1
    return Volume(turned, volume.affine @ to_old), to_old


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("sct_spinalcord_mr/t2.nii.gz", 0),
        ("sct_spinalcord_mr/t2.nii.gz", 45),
        ("totalsegmentator/ct_abdomen_small.nii.gz", 30),
    ],
)
def test_the_stored_orientation_changes_no_voxel(shared_data, name, degrees):
    original = Volume.load(shared_data / "singles" / name)
    brightest = ndimage.uniform_filter(original.array, 9).argmax()
    point = np.unravel_index(brightest, original.shape)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    original = Volume(original.array, turn @ original.affine)
    predictor = Predictor(StandIn(64), max_windows=2)
    predictor.set_volume(original)
    predictor.click(point)
    expected = predictor.predict().mask
    assert expected.any()
    point_mm = (original.affine @ [*point, 1])[:3]
    for order, flips in ORIENTATIONS:
        volume, to_old = stored(original, order, flips)
        predictor.set_volume(volume)
        predictor.click(point_mm=point_mm)
        in_mm = predictor.predict()
        predictor.reset()
        predictor.click(np.rint(np.linalg.solve(to_old, [*point, 1])[:3]))
        in_voxels = predictor.predict()
        back, _ = stored(Volume(expected, original.affine), order, flips)
        assert np.array_equal(in_mm.mask, back.array)
        assert np.array_equal(in_voxels.mask, back.array)
        assert in_mm.volume.affine.tobytes() == volume.affine.tobytes()


@pytest.mark.parametrize("axes", ["RAS", "PIR"])
@pytest.mark.parametrize("degrees", [0, 10, 30])
@pytest.mark.parametrize("spacing_mm", [(1.5, 1.5, 1.5), (0.7, 0.7, 5.0), (2.6, 0.9, 1.1)])
def test_oblique_and_anisotropic_objects_keep_place_and_size(predictor, axes, degrees, spacing_mm):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, c, -s], [0, s, c]]
    )
    order, signs = {"RAS": ((0, 1, 2), (1, 1, 1)), "PIR": ((1, 2, 0), (-1, -1, 1))}[axes]
    affine = np.eye(4)
    affine[:3, :3] = (turn @ np.eye(3)[:, order]) * signs * spacing_mm
    shape = tuple(round(96 / mm) for mm in spacing_mm)
    centre_mm = (affine @ [*(n / 2 for n in shape), 1])[:3]
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    places_mm = voxels @ affine[:3, :3].T + affine[:3, 3]
    ball = np.linalg.norm(places_mm - centre_mm, axis=-1) < 20
    predictor.set_volume(np.where(ball, 200, 50), affine)
    predictor.click(point_mm=centre_mm)
    mask = predictor.predict().mask
    assert dice(mask, ball) > 0.93
    moved_mm = places_mm[mask].mean(axis=0) - places_mm[ball].mean(axis=0)
    assert np.linalg.norm(moved_mm) < 0.3


# --- predicted Dice ------------------------------------------------------------------------------


def test_confidence_is_the_soft_dice_of_a_mask_with_its_probabilities():
    probs = torch.tensor([0.9, 0.6, 0.4, 0.1])
    window = WindowPrediction(probs.logit().reshape(2, 2, 1), ())
    assert ObjectState({(0, 0, 0): window}).confidence == pytest.approx(2 * 1.5 / (2 + 2))
    sure = WindowPrediction(torch.tensor([50.0, -50.0]).reshape(2, 1, 1), ())
    both = ObjectState({(0, 0, 0): window, (0, 0, 2): sure})
    assert both.confidence == pytest.approx(2 * 2.5 / (3 + 3))
    nothing = WindowPrediction(torch.full((2, 1, 1), -9.0), ())
    assert ObjectState({(0, 0, 0): nothing}).confidence == 0


def test_a_predicted_dice_is_calibrated_or_not_given(model, balls):
    predicted = []
    for calibration in (DiceCalibration(), DiceCalibration(1.0, 0.5, 2.0), None):
        model.pretrained_cfg = Weights(name="ours", clicks="all", dice_calibration=calibration)
        predictor = Predictor(model)
        predictor.set_volume(balls[0])
        predictor.click((22, 40, 36))
        predictor.click((23, 40, 36))
        predicted.append(predictor.predict().predicted_dice)
    confidence, calibrated, absent = predicted
    assert 0.01 < confidence < 0.99
    odds = np.e * np.sqrt(confidence / (1 - confidence)) * 2**2
    assert calibrated == pytest.approx(odds / (1 + odds))
    assert absent is None


def test_a_calibration_holds_for_clicks_given_as_it_was_fitted(model, balls):
    model.pretrained_cfg = Weights(name="ours", clicks="all", dice_calibration=DiceCalibration())
    predictor = Predictor(model, clicks="newest")
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    assert predictor.predict().predicted_dice is None


def test_a_window_encoded_ahead_is_the_one_that_a_click_uses(predictor, balls):
    volume, *_ = balls
    predictor.follow = False
    predictor.set_volume(volume)
    predictor.click((22, 40, 36))
    expected = predictor.predict().mask
    predictor.set_volume(volume)
    before = predictor.windows_encoded
    predictor.encode((22, 40, 36))
    assert predictor.windows_encoded == before + 1
    predictor.click((22, 40, 36))
    assert np.array_equal(predictor.predict().mask, expected)
    assert predictor.windows_encoded == before + 1
