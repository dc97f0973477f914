"""An earlier mask to refine."""

import numpy as np
import pytest


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_a_mask_prompt_alone_is_an_answer(predictor, model, balls):
    volume, first, _ = balls
    predictor.set_volume(volume)
    predictor.mask_prompt(first.astype(np.uint8))
    found = predictor.predict()
    assert dice(found.mask, first) > 0.9
    ((points, prior),) = model.prompt_encoder.told
    assert points is None
    assert (float(prior.min()), float(prior.max())) == pytest.approx((-10, 10))


def test_a_click_after_a_mask_prompt_corrects_it(predictor, balls):
    volume, first, second = balls
    predictor.set_volume(volume)
    predictor.mask_prompt(mask=first | second)
    predictor.click((36, 54, 36), positive=False)
    assert dice(predictor.predict().mask, first) > 0.9


def test_a_mask_prompt_replaces_earlier_clicks_until_it_is_undone(predictor, balls):
    volume, _, second = balls
    predictor.set_volume(volume)
    predictor.click((22, 40, 36))
    before = predictor.predict().mask
    predictor.mask_prompt(mask=second)
    assert dice(predictor.predict().mask, second) > 0.9
    predictor.undo()
    assert np.array_equal(predictor.predict().mask, before)


def test_a_mask_prompt_larger_than_a_window_is_followed(predictor, model):
    bar = np.zeros((40, 40, 200), bool)
    bar[14:26, 14:26, 8:192] = True
    predictor.set_volume(np.where(bar, 200, 50), np.diag([1.5, 1.5, 1.5, 1]))
    predictor.mask_prompt(mask=bar)
    found = predictor.predict()
    assert found.windows > 2
    assert dice(found.mask, bar) > 0.97
    predictor.click((20, 20, 100))
    passes = model.mask_decoder.passes
    assert dice(predictor.predict().mask, bar) > 0.97
    assert model.mask_decoder.passes - passes <= 3  # only the windows that hold the click
