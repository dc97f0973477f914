"""The interaction with a model: volume, clicks, failures."""

import logging

import numpy as np
import pytest
from standins import Broken, Fixed, Sphere, box

from sammed3d_backbone.clickbench.presets import whole_volume
from sammed3d_backbone.clickbench.protocol import Player
from sammed3d_backbone.strategies import Draws, largest_centre


def play(model, target, steps=4):
    return list(whole_volume(Player(model), target, [largest_centre], Draws("x"), steps))


def test_the_object_gets_the_whole_volume_as_it_is_stored(cube):
    target, model = cube(), Sphere()
    play(model, target)
    assert model.volume is target.image
    assert model.modality == "ct"


def test_a_volume_is_set_once_for_all_its_targets(cube):
    target, model = cube(), Sphere()
    player = Player(model)
    for _ in range(3):
        list(whole_volume(player, target, [largest_centre], Draws("x"), 2))
    assert model.volumes == 1
    assert len(model.clicks) == 2  # those of the last target only


def test_every_click_corrects_the_answer_before(cube):
    # A cube from 3 to 6: the first of its middle voxels is (4, 4, 4). An answer without the plane
    # x = 6 leaves that plane, all of whose voxels are one deep, so that the first, (6, 3, 3), is
    # clicked; an answer with the plane x = 7 gets a negative click there.
    shape = (10, 10, 10)
    short, long = box(shape, (3, 3, 3), (3, 4, 4)), box(shape, (3, 3, 3), (5, 4, 4))
    model = Fixed(short, long, long)
    steps = play(model, cube(), 3)
    assert model.clicks == [((4, 4, 4), True), ((6, 3, 3), True), ((7, 3, 3), False)]
    assert [step.clicks[0].is_repeat for step in steps] == [False] * 3


def test_an_object_that_does_not_answer_gets_the_next_best_voxel(cube):
    model = Fixed(np.zeros((10, 10, 10), bool))
    steps = play(model, cube(), 3)
    assert [point for point, _ in model.clicks] == [(4, 4, 4), (4, 4, 5), (4, 5, 4)]
    assert [step.clicks[0].is_repeat for step in steps] == [False, True, True]


def test_a_perfect_answer_is_carried_forward_without_clicks(cube):
    target = cube()
    model = Fixed(target.truth)
    steps = play(model, target, 4)
    assert len(model.clicks) == 1
    assert [len(step.clicks) for step in steps] == [1, 0, 0, 0]
    assert all((step.mask == target.truth).all() for step in steps)


def test_agreement_is_about_the_new_click_and_about_all(cube):
    # The second answer holds the second click, (6, 3, 3), but has lost the first one.
    shape = (10, 10, 10)
    model = Fixed(box(shape, (3, 3, 3), (3, 4, 4)), box(shape, (6, 3, 3), (1, 4, 4)))
    steps = play(model, cube(), 2)
    assert [step.agreement for step in steps] == [(True,), (True,)]
    assert steps[1].agreement_all == (False, True)


def test_a_failed_answer_is_an_empty_mask_and_the_next_click_is_tried(cube, caplog):
    model = Broken()
    steps = play(model, cube(), 3)
    assert [step.failure for step in steps] == ["", "RuntimeError", ""]
    assert not steps[1].mask.any()
    assert steps[2].mask.any()
    assert "counts as an empty mask" in caplog.text


def test_the_volume_is_set_anew_after_a_failure(cube, caplog):
    caplog.set_level(logging.CRITICAL)
    target, model = cube(), Broken()
    player = Player(model)
    for _ in range(2):
        list(whole_volume(player, target, [largest_centre], Draws("x"), 2))
    assert model.volumes == 2


def test_an_object_that_refuses_the_volume_fails_at_every_step(cube, caplog):
    class Refusing(Sphere):
        def set_volume(self, volume, *, modality=None):
            raise MemoryError

    steps = play(Refusing(), cube(), 3)
    assert [step.failure for step in steps] == ["MemoryError"] * 3
    assert len(caplog.records) == 1


def test_a_mask_on_another_grid_stops_the_run(cube):
    with pytest.raises(ValueError, match="on the grid of the volume"):
        play(Fixed(np.ones((2, 2, 2))), cube())


def test_the_time_of_setting_a_volume_belongs_to_its_first_answer(cube):
    first, second = play(Sphere(), cube(), 2)
    assert first.seconds.keys() == {"set_volume", "click"}
    assert second.seconds.keys() == {"click"}
