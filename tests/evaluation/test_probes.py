"""Probes on features whose right answer is known."""

import numpy as np
import pytest

from sammed3d_backbone.evaluation.probes import NEIGHBOURS, PROBES, Voxels, probe

CLASSES = ("background", "head", "tail")


@pytest.fixture
def made(rng):
    """Voxels of some subjects, whose features point in the direction of their class."""

    def make(subjects, *, per_class=40, noise=0.05, values=(0, 1, 2)):
        directions = np.eye(3, 6) * 2 - 1
        classes = np.tile(np.repeat(values, per_class), len(subjects))
        features = directions[classes] + noise * rng.normal(size=(len(classes), 6))
        return Voxels(features, classes, np.repeat(subjects, per_class * len(values)))

    return make


@pytest.mark.parametrize("kind", PROBES)
def test_classes_that_lie_apart_are_all_told_apart(made, kind):
    scores = probe(kind, made(["a", "b"]), made(["c", "d"]), CLASSES)
    assert set(scores.dice) == {"head", "tail"}
    for interval in (*scores.dice.values(), scores.mean_dice, scores.balanced_accuracy):
        assert interval == (1, 1, 1)


@pytest.mark.parametrize("kind", PROBES)
def test_shuffled_classes_are_told_apart_by_chance(made, rng, kind):
    bank, asked = made(["a", "b"], per_class=200), made(["c", "d", "e"], per_class=200)
    shuffled = Voxels(bank.features, rng.permutation(bank.values), bank.subjects)
    noise = Voxels(rng.normal(size=asked.features.shape), asked.values, asked.subjects)
    scores = probe(kind, shuffled, noise, CLASSES)
    assert scores.balanced_accuracy.mean == pytest.approx(1 / 3, abs=0.05)
    assert scores.mean_dice.mean < 0.5  # the Dice of a class that is named always


@pytest.mark.parametrize("kind", PROBES)
def test_a_large_constant_channel_hides_nothing(made, rng, kind):
    bank, asked = made(["a"]), made(["b", "c"])
    for voxels in (bank, asked):
        voxels.features[:, 5] = 1e4 + rng.normal(size=len(voxels.values))
    assert probe(kind, bank, asked, CLASSES).mean_dice.mean > 0.95


def test_near_neighbours_win_over_many(made):
    few = made(["a"], per_class=6, noise=0.01, values=(1,))
    many = made(["a"], per_class=14, noise=0.01, values=(2,))
    bank = Voxels(*(np.concatenate([getattr(v, n) for v in (few, many)]) for n in vars(few)))
    assert len(bank.values) == NEIGHBOURS  # so that all of them vote
    asked = made(["b", "c"], per_class=5, noise=0.01, values=(1,))
    assert probe("knn", bank, asked, CLASSES).dice["head"].mean == 1


def test_a_class_that_a_subject_lacks_is_left_out(made):
    whole, part = made(["c", "d"]), made(["e"], values=(0, 2))
    asked = Voxels(*(np.concatenate([getattr(v, n) for v in (whole, part)]) for n in vars(whole)))
    scores = probe("knn", made(["a"]), asked, CLASSES)
    assert scores.mean_dice == (1, 1, 1)
    assert scores.by_subject == {"c": 1, "d": 1, "e": 1}


def test_dice_and_accuracy_are_those_of_a_confusion_by_hand(made):
    asked = made(["b", "c"], per_class=10)
    wrong = asked.values.copy()
    wrong[asked.values == 1] = np.tile([1, 1, 1, 1, 2], 4)  # of 10 heads look 2 like tails
    seen = Voxels(made(["x"]).features[wrong * 40], asked.values, asked.subjects)
    scores = probe("knn", made(["a"]), seen, CLASSES)
    assert scores.dice["head"].mean == pytest.approx(2 * 8 / (10 + 8))
    assert scores.dice["tail"].mean == pytest.approx(2 * 10 / (10 + 12))
    assert scores.balanced_accuracy.mean == pytest.approx((1 + 0.8 + 1) / 3)
    assert scores.by_subject == pytest.approx({"b": (1 + 0.8 + 1) / 3, "c": (1 + 0.8 + 1) / 3})


def test_one_subject_alone_has_no_interval(made):
    assert np.isnan(probe("knn", made(["a"]), made(["b"]), CLASSES).mean_dice.low)


def test_a_subject_on_both_sides_is_refused(made):
    with pytest.raises(ValueError, match="1 subjects are in both bank and queries, b"):
        probe("knn", made(["a", "b"]), made(["b", "c"]), CLASSES)


def test_an_unknown_probe_is_refused(made):
    with pytest.raises(ValueError, match="choose one of knn, linear, prototype"):
        probe("forest", made(["a"]), made(["b"]), CLASSES)


@pytest.mark.parametrize("asked", [{"per_class": 6}, {"values": (1,)}])
def test_a_bank_that_teaches_nothing_is_refused(made, asked):
    with pytest.raises(ValueError, match="draw at least 20 voxels of two classes"):
        probe("knn", made(["a"], **asked), made(["b"]), CLASSES)


@pytest.mark.parametrize("counts", [(3, 2, 3), (3, 3, 2), (0, 0, 0)])
def test_every_voxel_needs_a_class_and_a_subject(counts):
    features, values, subjects = counts
    with pytest.raises(ValueError, match="give one of each for every voxel"):
        Voxels(np.zeros((features, 4)), np.zeros(values, int), np.array(["a"] * subjects))
