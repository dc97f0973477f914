"""Click lists: replayed to the same bits, refused where they do not belong."""

import json

import numpy as np
import pytest
import torch
from standin import StandIn

from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.inference.interactive import Predictor
from sammed3d_backbone.inference.interactive.click_io import volume_sha256


@pytest.fixture
def saved(tmp_path, predictor, balls):
    """A session of four clicks on two objects, saved."""
    predictor.set_volume(balls[0])
    predictor.click((22, 40, 36), object="left")
    predictor.click((36, 54, 36), object="right")
    predictor.click((36, 54, 37), object="left")
    predictor.click((36, 55, 36), False, object="left")
    predictor.save_clicks(tmp_path / "clicks.json")
    return tmp_path / "clicks.json"


def test_a_replay_gives_the_same_bits(saved, predictor, balls):
    again = Predictor(StandIn())
    again.set_volume(balls[0])
    again.load_clicks(saved)
    assert again.objects == ["left", "right"]
    for name in again.objects:
        theirs, ours = predictor.predict(name), again.predict(name)
        assert np.array_equal(ours.mask, theirs.mask)
        assert ours.probs().tobytes() == theirs.probs().tobytes()
    again.save_clicks(saved.with_name("again.json"))
    assert saved.with_name("again.json").read_text() == saved.read_text()


def test_a_list_by_hand_needs_only_its_clicks(tmp_path, predictor, balls):
    path = tmp_path / "hand.json"
    path.write_text('{"clicks": [{"point_mm": [33, 60, 54]}, {"point_vox": [36, 54, 36]}]}')
    predictor.set_volume(balls[0])
    predictor.load_clicks(path)
    assert predictor.predict().clicks == 2


def test_the_hash_is_of_values_and_not_of_their_storage(balls):
    volume, *_ = balls
    same = Volume(np.asfortranarray(volume.array.astype(">f8")), volume.affine)
    assert volume_sha256(volume) == volume_sha256(same)
    changed = volume.array.copy()
    changed[3, 4, 5] += 1
    assert volume_sha256(volume) != volume_sha256(Volume(changed, volume.affine))
    shifted = volume.affine + np.eye(4, k=3)  # by 1 mm
    assert volume_sha256(volume) != volume_sha256(Volume(volume.array, shifted))


def edited(saved, **changes):
    saved.write_text(json.dumps(json.loads(saved.read_text()) | changes))
    return saved


REFUSED = {
    "no file": (lambda p: p.with_name("no.json"), FileNotFoundError, "no.json"),
    "no JSON": (lambda p: [p.write_text("{,"), p][1], ValueError, "JSON"),
    "other JSON": (lambda p: [p.write_text("[1]"), p][1], ValueError, "clicks"),
    "a key twice": (
        lambda p: [p.write_text('{"clicks": [], "clicks": []}'), p][1],
        ValueError,
        "clicks",
    ),
    "newer": (lambda p: edited(p, format="x/2"), ValueError, "format"),
    "unknown entry": (lambda p: edited(p, boxes=[]), ValueError, "boxes"),
    "unknown part": (lambda p: edited(p, clicks=[{"xyz": 1}]), ValueError, "click 1"),
    "no sign": (
        lambda p: edited(p, clicks=[{"point_vox": [1, 2, 3], "positive": 1}]),
        ValueError,
        "positive",
    ),
    "no name": (
        lambda p: edited(p, clicks=[{"point_vox": [1, 2, 3], "object": 1}]),
        ValueError,
        "object",
    ),
    "empty name": (
        lambda p: edited(p, clicks=[{"point_vox": [1, 2, 3], "object": ""}]),
        ValueError,
        "click 1: object",
    ),
    "outside": (lambda p: edited(p, clicks=[{"point_vox": [1, 2, 300]}]), ValueError, "point_vox"),
    "other settings": (lambda p: edited(p, settings={"follow": False}), ValueError, "follow"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replayed_is_refused_and_the_clicks_stay(saved, predictor, case):
    change, kind, said = REFUSED[case]
    with pytest.raises(kind, match=said):
        predictor.load_clicks(change(saved))
    assert predictor.objects == ["left", "right"]


def test_another_volume_or_network_is_refused(saved, predictor, balls):
    other = StandIn()
    other.register_buffer("value", torch.ones(1))
    stranger = Predictor(other)
    stranger.set_volume(balls[0])
    with pytest.raises(ValueError, match="weights"):
        stranger.load_clicks(saved)
    predictor.set_volume(balls[0].array + 1, balls[0].affine)
    with pytest.raises(ValueError, match="volume"):
        predictor.load_clicks(saved)


def test_a_list_is_not_overwritten_in_passing(saved, predictor):
    with pytest.raises(FileExistsError, match="clicks"):
        predictor.save_clicks(saved)
    predictor.undo()
    predictor.save_clicks(saved, overwrite=True)
    assert len(json.loads(saved.read_text())["clicks"]) == 3


def test_a_mask_prompt_does_not_fit_into_a_list(tmp_path, predictor, balls):
    predictor.set_volume(balls[0])
    predictor.mask_prompt(mask=balls[1])
    with pytest.raises(ValueError, match="mask"):
        predictor.save_clicks(tmp_path / "clicks.json")
    assert not list(tmp_path.iterdir())
