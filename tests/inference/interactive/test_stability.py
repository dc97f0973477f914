"""How much a mask depends on the exact position of the clicks."""

import numpy as np
import pytest

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive.predictor import voxel_near


def test_an_object_that_any_click_finds_is_stable(predictor, balls):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    assert predictor.stability(trials=4) == 1.0


def test_a_click_on_an_edge_is_not(predictor, balls):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 44))  # the last voxels of the ball
    mask = predictor.predict().mask
    stability = predictor.stability(radius_mm=6.0)
    assert 0 < stability < 1
    assert predictor.stability(radius_mm=6.0) == stability
    assert np.array_equal(predictor.predict().mask, mask)


def test_it_costs_the_decoder_only(predictor, model, balls):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    predictor.click((36, 54, 36))
    predictor.predict()
    encoded, decoded = model.image_encoder.passes, model.mask_decoder.passes
    predictor.stability(trials=3)
    assert model.image_encoder.passes == encoded
    assert model.mask_decoder.passes == decoded + 3 * 2


def test_moved_clicks_stay_near_and_in_the_volume(rng):
    affine = np.array([[0, 0, -2.0, 5], [-0.9, 0.3, 0, 1], [0.1, 2.4, 0.2, 2], [0, 0, 0, 1]])
    volume = Volume(np.zeros((9, 9, 9), np.float32), affine)
    for point in [(4, 4, 4), (0, 0, 8)]:
        moved = np.array([voxel_near(point, volume, 3.0, rng) for _ in range(200)])
        assert moved.min() >= 0
        assert moved.max() <= 8
        assert len(np.unique(moved, axis=0)) > 5
        away_mm = np.linalg.norm((moved - point) @ affine[:3, :3].T, axis=1)
        assert away_mm.max() <= 3.0 + 2.0  # a voxel's rounding


def test_there_is_at_least_one_trial(predictor, balls):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    with pytest.raises(ValueError, match="trials"):
        predictor.stability(trials=0)
