"""Objects longer than a window come out whole: nothing missing, no seams, nothing else."""

import numpy as np
import pytest
import torch
from standin import StandIn

from sammed3d_backbone.inference.interactive import Predictor

AFFINE = np.diag([1.5, 1.5, 1.5, 1.0])


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def bright(mask):
    return np.where(mask, 200, 50).astype(np.int16)


@pytest.fixture
def bar():
    """A square bar of 276 mm, along the third axis."""
    mask = np.zeros((64, 64, 200), bool)
    mask[26:38, 24:40, 8:192] = True
    return mask


def test_a_long_bar_comes_out_whole_and_without_seams(predictor, model, bar):
    predictor.set_volume(bright(bar), AFFINE)
    predictor.click((32, 32, 60))
    found = predictor.predict()
    assert np.array_equal(found.mask[:, :, 12:188], bar[:, :, 12:188])  # slice by slice
    assert dice(found.mask, bar) > 0.99
    assert found.windows == model.image_encoder.passes
    assert found.windows <= 200 // 32


def test_it_does_not_matter_where_a_long_bar_is_clicked(predictor, bar):
    predictor.set_volume(bright(bar), AFFINE)
    masks = []
    for k in (9, 100, 191):
        predictor.reset()
        predictor.click((32, 32, k))
        masks.append(predictor.predict().mask[:, :, 12:188])
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2])


@pytest.mark.parametrize("spacing_mm", [0.9, 1.5, 2.5])
def test_a_winding_tube_is_followed_and_its_neighbour_is_left_alone(predictor, spacing_mm):
    shape = [round(length / spacing_mm) for length in (150, 100, 400)]
    x, y, z = (
        np.arange(n).reshape(s) * spacing_mm
        for n, s in zip(shape, [(-1, 1, 1), (1, -1, 1), (1, 1, -1)], strict=True)
    )
    middle = 55 + 30 * np.sin(z / 60)
    inside = (z > 20) & (z < 380)
    tube = ((x - middle) ** 2 + (y - 50) ** 2 < 14**2) & inside
    neighbour = ((x - middle - 40) ** 2 + (y - 50) ** 2 < 8**2) & inside
    predictor.set_volume(bright(tube | neighbour), np.diag([spacing_mm] * 3 + [1]))
    predictor.click(point_mm=(55, 50, 190))
    found = predictor.predict()
    slices = range(round(24 / spacing_mm), round(376 / spacing_mm))
    assert min(dice(found.mask[:, :, k], tube[:, :, k]) for k in slices) > 0.92
    assert not (found.mask & neighbour).any()
    assert not [note for note in found.notes if "window" in note]


def test_an_object_wider_than_a_window_is_filled(predictor):
    x, y, z = np.ogrid[:110, :100, :96]
    ball = (x - 55) ** 2 + (y - 50) ** 2 + (z - 48) ** 2 < 42**2
    predictor.set_volume(bright(ball), AFFINE)
    predictor.click((20, 50, 48))
    assert dice(predictor.predict().mask, ball) > 0.97


def test_without_following_the_object_ends_with_its_window(model, bar):
    predictor = Predictor(model, follow=False)
    predictor.set_volume(bright(bar), AFFINE)
    predictor.click((32, 32, 60))
    found = predictor.predict()
    assert found.windows == 1
    assert np.flatnonzero(found.mask.any(axis=(0, 1)))[[0, -1]].tolist() == [28, 91]


def test_following_stops_at_its_bound_and_says_so(model, bar):
    predictor = Predictor(model, max_windows=3)
    predictor.set_volume(bright(bar), AFFINE)
    predictor.click((32, 32, 60))
    found = predictor.predict()
    assert found.windows == 3
    assert "max_windows" in found.notes[-1]


def test_clicks_far_apart_open_a_window_each(predictor, model, bar):
    bar[:, :, 70:130] = False
    predictor.set_volume(bright(bar), AFFINE)
    predictor.click((32, 32, 20))
    predictor.click((32, 32, 180))
    found = predictor.predict()
    assert dice(found.mask, bar) > 0.97
    assert found.clicks_agreed == 2


def test_a_later_click_costs_the_decoder_only_where_it_lies(predictor, model, bar):
    predictor.set_volume(bright(bar), AFFINE)
    predictor.click((32, 32, 60))
    predictor.predict()
    encoded, decoded = model.image_encoder.passes, model.mask_decoder.passes
    predictor.click((32, 32, 180))
    predictor.predict()
    assert model.image_encoder.passes == encoded
    assert model.mask_decoder.passes <= decoded + 3


def test_a_correction_drops_what_only_it_had_led_to(predictor, bar):
    predictor.set_volume(bright(bar), AFFINE)
    predictor.click((32, 32, 60))
    assert predictor.predict().windows > 3
    predictor.click((32, 32, 62), positive=False)
    found = predictor.predict()
    assert found.windows == 1
    assert not found.mask.any()


def test_what_the_network_sees_in_padding_is_not_followed():
    class Misled(StandIn):
        """Holds padding before the first voxel for part of the object."""

        def predict_masks(self, embedding, points=None, mask_logits=None):
            logits, rating = super().predict_masks(embedding, points, mask_logits)
            return torch.where(torch.arange(32)[:, None, None] < 10, 8.0, logits), rating

    x, y, z = np.ogrid[:90, :90, :90]
    ball = (x - 9) ** 2 + (y - 45) ** 2 + (z - 45) ** 2 < 8**2
    predictor = Predictor(Misled())
    predictor.set_volume(bright(ball), AFFINE)
    predictor.click((9, 45, 45))  # 23 voxels of its window lie in padding
    found = predictor.predict()
    assert found.windows == 1
    assert not (found.mask & ~ball).sum() > 0.2 * ball.sum()


def test_a_neighbour_that_contradicts_what_is_known_is_left_out(bar):
    class Wild(StandIn):
        """Finds everything wherever it is asked a second time."""

        def __init__(self):
            super().__init__()
            self.mask_decoder.register_forward_hook(
                lambda module, given, result: (
                    (torch.full_like(result[0], 8.0), result[1]) if module.passes > 1 else result
                )
            )

    predictor = Predictor(Wild())
    predictor.set_volume(bright(bar), AFFINE)
    predictor.click((32, 32, 60))
    found = predictor.predict()
    assert found.windows == 1
    assert "2 windows" in found.notes[-1]
    assert np.array_equal(found.mask[:, :, 40:80], bar[:, :, 40:80])


def test_following_can_be_turned_on_and_off_with_the_prompts_kept(predictor, model, bar):
    predictor.set_volume(bright(bar), AFFINE)
    predictor.click((32, 32, 60))
    whole = predictor.predict()
    passes = model.image_encoder.passes, model.mask_decoder.passes
    predictor.follow = False
    assert predictor.predict().windows == 1
    predictor.follow = True
    again = predictor.predict()
    assert np.array_equal(again.mask, whole.mask)
    assert model.image_encoder.passes == passes[0]
    assert model.mask_decoder.passes == passes[1] + 1
    predictor.undo()
    predictor.follow = False
    predictor.click((32, 32, 100))
    assert predictor.predict().clicks == 1
