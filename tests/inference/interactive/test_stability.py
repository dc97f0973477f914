"""Whether an answer stands when clicks fall a little elsewhere."""

import numpy as np
import pytest

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive.stability import compare, voxel_near


def test_an_object_that_any_click_finds_is_certain(predictor, balls):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    quality = predictor.quality(answers=4)
    assert (quality.agreement, quality.worst, quality.answers) == (1.0, 1.0, 5)
    assert not quality.uncertainty().any()


def test_a_click_on_an_edge_is_uncertain_and_the_map_shows_where(predictor, balls):
    volume, *_ = balls
    predictor.set_volume(volume)
    predictor.click((22, 40, 44))  # the last voxels of the ball
    mask = predictor.predict().mask
    quality = predictor.quality(answers=8, radius_mm=6.0)
    assert quality.worst < quality.agreement < 1
    uncertainty = quality.uncertainty()
    assert 0 < uncertainty.max() <= 1
    assert not uncertainty[~mask].any()
    again = predictor.quality(answers=8, radius_mm=6.0)
    assert again.agreement == quality.agreement
    assert np.array_equal(predictor.predict().mask, mask)


def test_it_costs_the_decoder_only(predictor, model, balls):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    predictor.click((36, 54, 36))
    predictor.predict()
    encoded, decoded = model.image_encoder.passes, model.mask_decoder.passes
    predictor.quality(answers=3)
    assert model.image_encoder.passes == encoded
    assert model.mask_decoder.passes == decoded + 3 * 2


def test_the_figures_are_those_of_the_masks():
    mask = np.array([[[1, 1, 0, 0]]], bool)
    others = [np.array([[[1, 1, 1, 0]]], bool), np.array([[[0, 0, 0, 1]]], bool)]
    quality = compare(mask, others)
    assert quality.agreement == pytest.approx((0.8 + 0) / 2)
    assert quality.worst == 0
    assert np.allclose(quality.uncertainty(), [[[2 / 3, 2 / 3, 2 / 3, 2 / 3]]])
    assert compare(~mask & mask, [~mask & mask]).agreement == 1


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


@pytest.mark.parametrize("answers", [0, 255])
def test_answers_have_a_range(predictor, balls, answers):
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36))
    with pytest.raises(ValueError, match="from 1 to 254"):
        predictor.quality(answers=answers)
