"""A teacher's answers: geometry between two networks, what is kept, files, samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from balls import answer_balls

from sammed3d_backbone import Volume, sam
from sammed3d_backbone.data.preprocessing import SAM_MED3D
from sammed3d_backbone.models.sam import Sam3D
from sammed3d_backbone.pretraining.teacher import (
    Answer,
    Answers,
    AnswerStream,
    CropPlace,
    FieldOfView,
    RawScan,
    Teacher,
    Variation,
    answer_crop,
    draw_places,
    masks_of,
    objects_in,
    translated,
    write_answer,
)

SIDE = 16


def field(side_vox, spacing_mm, statistics="volume", tokens=None):
    preprocessing = replace(
        SAM_MED3D, spacing_mm=(spacing_mm,) * 3, statistics=statistics, crop_vox=(side_vox,) * 3
    )
    tokens = tokens or side_vox // 8
    return FieldOfView(side_vox, tokens, preprocessing.spacing_mm, preprocessing)


STUDENT = field(SIDE, 1.0)


def teacher(side_vox=SIDE, spacing_mm=1.0, statistics="volume", **changes):
    torch.manual_seed(0)
    network = sam("nano", pretrained=False, img_size=side_vox).eval()
    options = {"clicks": 4, "stability": 0.3, "smallest_vox": 1} | changes
    return Teacher(network, field(side_vox, spacing_mm, statistics), **options)


@pytest.fixture
def ramp():
    """A scan whose intensity is a place in mm, on a grid of its own; another array order."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in (40, 30, 36)), indexing="ij")
    affine = np.diag([-1.0, 2.0, 1.0, 1.0])
    return RawScan.of(Volume((100.0 - x + 2 * y + z).astype(np.float32), affine))


PLACE = CropPlace((20.0, 15.0, 18.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(("side_vox", "spacing_mm"), [(24, 0.75), (16, 1.0), (8, 2.5)])
@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (1.3, -0.8, -1.1)])
def test_a_click_is_at_the_same_place_of_the_scan_for_both_networks(
    ramp, side_vox, spacing_mm, factors
):
    # The scan shows places in mm, so that equal intensities are equal places.
    place = CropPlace(PLACE.middle_vox, factors)
    other = field(side_vox, spacing_mm)
    ours, _ = ramp.cut(place, STUDENT)
    theirs, _ = ramp.cut(place, other)
    points = torch.tensor([[7, 8, 6], [5, 9, 10], [8, 8, 8]])
    moved = translated(points, STUDENT, other)
    seen = theirs[tuple(moved.T)] - ours[tuple(points.T)]
    assert seen.abs().max() <= 3 * max(1, spacing_mm) / 2 * max(map(abs, factors)) + 1e-4
    back = translated(moved, other, STUDENT)
    assert (back - points).abs().max() <= max(1, spacing_mm / 2)


def test_a_crop_has_its_middle_at_the_place_and_zeros_outside(ramp):
    crop, inside = ramp.cut(PLACE, field(15, 1.0, tokens=1))
    assert crop[7, 7, 7] == ramp.image[20, 15, 18]
    assert inside.all()
    crop, inside = ramp.cut(CropPlace((0.0, 0.0, 0.0), PLACE.factors), STUDENT)
    assert not inside[:7].any()
    assert (crop[~inside] == 0).all()


def test_labels_follow_the_image():
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[6:14, 6:14, 6:14] = 3
    scan = RawScan.of(Volume(labels.astype(np.float32), np.eye(4)), Volume(labels, np.eye(4)))
    place = CropPlace((9.5, 9.5, 9.5), (0.5, 1.0, -0.75))
    image, _ = scan.cut(place, STUDENT)
    found = scan.cut_labels(place, STUDENT)
    assert torch.equal(found == 3, image > 1.5)


def test_one_grid_is_answered_as_the_teacher_answers(ramp, monkeypatch):
    monkeypatch.setattr(Sam3D, "decode", answer_balls)
    mine = teacher()
    answer = answer_crop(np.random.default_rng(0), ramp, PLACE, STUDENT, mine)
    image = answer.image.float()[None, None]
    expected = mine.network.encode(image).embedding[0]
    torch.testing.assert_close(answer.embedding.float(), expected, rtol=1e-2, atol=1e-2)
    assert len(answer.logits) >= 2
    clicks = answer.points.long()[:, None], torch.ones(len(answer.points), 1)
    assert torch.equal(answer.logits, mine.network.decode(None, clicks)[:, 0].half())


@pytest.mark.parametrize("statistics", ["volume", "crop"])
def test_masks_of_another_grid_lie_around_the_click(ramp, monkeypatch, statistics):
    monkeypatch.setattr(Sam3D, "decode", answer_balls)
    mine = teacher(32, 0.5, statistics)
    answer = answer_crop(np.random.default_rng(0), ramp, PLACE, STUDENT, mine)
    masks = masks_of(answer.logits, SIDE)
    for mask, point in zip(masks, answer.points, strict=True):
        if ((point > 3) & (point < SIDE - 4)).all():
            middle = mask.nonzero().float().mean(0)
            assert (middle - point).abs().max() < 1


def test_masks_that_the_teachers_view_cuts_off_are_not_kept(ramp, monkeypatch):
    monkeypatch.setattr(Sam3D, "decode", answer_balls)
    wide = teacher(16, 1.0, clicks=32)
    narrow = teacher(8, 1.0, clicks=32)
    kept = [
        len(answer_crop(np.random.default_rng(0), ramp, PLACE, STUDENT, each).logits)
        for each in (wide, narrow)
    ]
    assert kept[1] < kept[0]
    answer = answer_crop(np.random.default_rng(0), ramp, PLACE, STUDENT, narrow)
    assert not (masks_of(answer.logits, SIDE)[:, :3]).any()
    assert ((answer.points >= 4) & (answer.points < 12)).all()


@pytest.mark.parametrize("changes", [{"stability": 1.0}, {"smallest_vox": 4000}])
def test_masks_that_are_not_confident_or_too_small_are_not_kept(ramp, monkeypatch, changes):
    monkeypatch.setattr(Sam3D, "decode", answer_balls)
    answer = answer_crop(np.random.default_rng(0), ramp, PLACE, STUDENT, teacher(**changes))
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


def test_the_first_places_do_not_depend_on_their_number(ramp):
    few, many = (
        draw_places(np.random.default_rng(0), ramp, STUDENT, n, Variation(1.5, 1.1, (0.5,) * 3), 1)
        for n in (2, 5)
    )
    assert few == many[:2]


@pytest.fixture
def stored(tmp_path):
    """Writes an answer with masks and labels."""

    def write(masks=2, values=(1, 2)):
        labels = torch.zeros(SIDE, SIDE, SIDE, dtype=torch.int16)
        for value in values:
            labels[4 * value : 4 * value + 3] = value
        logits = torch.full((masks, 8, 8, 8), -1.0)
        logits[:, :4, :, :] = 1
        path = tmp_path / "a.safetensors"
        answer = Answer(
            torch.randn(SIDE, SIDE, SIDE).half(),
            labels,
            torch.randn(5, 2, 2, 2).half(),
            logits.half(),
            torch.zeros(masks, 3, dtype=torch.int16),
        )
        write_answer(path, answer, smallest_vox=10)
        return path

    return write


def stream(path, **changes):
    options = {"objects": 4, "steps": 2, "samples": 3, "seed": (0,), "smallest_vox": 10} | changes
    return AnswerStream([Answers("a", (path,))], [1.0], **options)


def test_files_say_how_many_objects_they_hold(stored, tmp_path):
    assert objects_in(stored()) == 4
    assert objects_in(stored(masks=0, values=())) == 0
    assert objects_in(tmp_path / "missing.safetensors") is None
    (tmp_path / "cut.safetensors").write_bytes(stored().read_bytes()[:40])
    assert objects_in(tmp_path / "cut.safetensors") is None


@pytest.mark.parametrize(
    ("masks", "values", "label_share", "labelled"),
    [(2, (1, 2), 0.5, 2), (2, (1, 2), 1.0, 2), (2, (1,), 0.5, 1), (0, (1,), 0.0, 4), (2, (), 1, 0)],
)
def test_samples_mix_masks_and_labels(stored, masks, values, label_share, labelled):
    sample = stream(stored(masks, values), label_share=label_share)[0]
    objects = sample["objects"]
    assert objects.shape == (4, SIDE, SIDE, SIDE)
    sizes = objects.flatten(1).sum(1)
    assert (sizes == 3 * SIDE**2).sum() == labelled
    assert sizes.min() > 0
    assert sample["embedding"].dtype == torch.float32


def test_samples_are_functions_of_their_number(stored):
    one, two = stream(stored(), contrast_share=0.5), stream(stored(), contrast_share=0.5)
    two[2]
    assert all(torch.equal(tensor, two[1][name]) for name, tensor in one[1].items())
