"""Dice, and what it means where a class is absent."""

import math

import pytest
import torch

from sammed3d_backbone.evaluation.metrics import dice_per_class, mean_of_known


def line(values):
    return torch.tensor(values).reshape(-1, 1, 1)


def test_dice_is_twice_the_overlap_over_both_sizes():
    scores = dice_per_class(line([1, 1, 0, 2]), line([1, 0, 0, 2]), 3)
    assert scores == pytest.approx([2 / 3, 1.0])


@pytest.mark.parametrize(
    ("prediction", "label", "expected"),
    [([0, 0], [0, 0], math.nan), ([1, 0], [0, 0], 0.0), ([0, 0], [0, 1], 0.0), ([0, 1], [0, 1], 1)],
)
def test_absent_classes_score_as_written_down(prediction, label, expected):
    (score,) = dice_per_class(line(prediction), line(label), 2)
    assert score == pytest.approx(expected, nan_ok=True)


def test_dice_is_symmetric(generator):
    one, other = (torch.randint(0, 4, (5, 6, 7), generator=generator) for _ in range(2))
    assert dice_per_class(one, other, 4) == dice_per_class(other, one, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_the_integer_type_does_not_matter(dtype, generator):
    labels = torch.randint(0, 3, (4, 4, 4), generator=generator)
    assert dice_per_class(labels.to(dtype), labels, 3) == [1.0, 1.0]


def test_a_mean_leaves_out_what_was_not_asked():
    assert mean_of_known([1.0, math.nan, 0.5]) == 0.75
    assert math.isnan(mean_of_known([math.nan]))
