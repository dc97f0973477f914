"""A teacher's answers: what is kept, and where it lies."""

import numpy as np
import pytest
import torch
from balls import answer_balls
from ramp import PLACE, RAMP, SIDE, STUDENT, field

from sammed3d_backbone import Volume, sam
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.pretraining.teacher import Teacher, answer_crop, masks_of
from sammed3d_backbone.pretraining.views import CropPlace, RawScan, Variation, draw_places


def teacher(side_vox=SIDE, spacing_mm=1.0, statistics="volume", **changes):
    torch.manual_seed(0)
    network = sam("nano", pretrained=False, img_size=side_vox).eval()
    options = {"clicks": 4, "stability": 0.3, "smallest_vox": 1} | changes
    return Teacher(network, field(side_vox, spacing_mm, statistics), **options)


def test_one_grid_is_answered_as_the_teacher_answers(monkeypatch):
    monkeypatch.setattr(Sam3D, "decode", answer_balls)
    mine = teacher()
    answer = answer_crop(np.random.default_rng(0), RAMP, PLACE, STUDENT, mine)
    image = answer.image.float()[None, None]
    expected = mine.network.encode(image).embedding[0]
    torch.testing.assert_close(answer.embedding.float(), expected, rtol=1e-2, atol=1e-2)
    assert len(answer.logits) >= 2
    clicks = answer.points.long()[:, None], torch.ones(len(answer.points), 1)
    assert torch.equal(answer.logits, mine.network.decode(None, clicks)[:, 0].half())


@pytest.mark.parametrize("statistics", ["volume", "crop"])
def test_masks_of_another_grid_lie_around_the_click(monkeypatch, statistics):
    monkeypatch.setattr(Sam3D, "decode", answer_balls)
    mine = teacher(32, 0.5, statistics)
    answer = answer_crop(np.random.default_rng(0), RAMP, PLACE, STUDENT, mine)
    masks = masks_of(answer.logits, SIDE)
    for mask, point in zip(masks, answer.points, strict=True):
        if ((point > 3) & (point < SIDE - 4)).all():
            middle = mask.nonzero().float().mean(0)
            assert (middle - point).abs().max() < 1


def test_masks_that_the_teachers_view_cuts_off_are_not_kept(monkeypatch):
    monkeypatch.setattr(Sam3D, "decode", answer_balls)
    wide = teacher(16, 1.0, clicks=32)
    narrow = teacher(8, 1.0, clicks=32)
    kept = [
        len(answer_crop(np.random.default_rng(0), RAMP, PLACE, STUDENT, each).logits)
        for each in (wide, narrow)
    ]
    assert kept[1] < kept[0]
    answer = answer_crop(np.random.default_rng(0), RAMP, PLACE, STUDENT, narrow)
    assert not (masks_of(answer.logits, SIDE)[:, :3]).any()
    assert ((answer.points >= 4) & (answer.points < 12)).all()


@pytest.mark.parametrize("changes", [{"stability": 1.0}, {"smallest_vox": 4000}])
def test_masks_that_are_not_confident_or_too_small_are_not_kept(monkeypatch, changes):
    monkeypatch.setattr(Sam3D, "decode", answer_balls)
    answer = answer_crop(np.random.default_rng(0), RAMP, PLACE, STUDENT, teacher(**changes))
    assert not len(answer.logits)


def test_air_is_not_clicked(monkeypatch):
    monkeypatch.setattr(Sam3D, "decode", answer_balls)
    array = np.zeros((30, 30, 30), np.float32)
    array[10:20] = 100
    scan = RawScan.of(Volume(array, np.eye(4)))
    place = CropPlace((14.5, 14.5, 14.5), (1.0, 1.0, 1.0))
    answer = answer_crop(np.random.default_rng(0), scan, place, STUDENT, teacher(clicks=16))
    assert ((answer.points[:, 0] >= 3) & (answer.points[:, 0] < 13)).all()
    places = draw_places(np.random.default_rng(0), scan, STUDENT, 6, Variation(), 1)
    assert all(10 - 4 <= each.middle_vox[0] <= 19 + 4 for each in places)
