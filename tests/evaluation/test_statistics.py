"""Bootstrap intervals."""

import math

import numpy as np
import pytest

from sammed3d_backbone.evaluation.statistics import bootstrap_interval


def test_the_mean_is_the_mean_and_lies_inside():
    mean, low, high = bootstrap_interval([0.7, 0.8, 0.9, 0.6, 0.75])
    assert mean == pytest.approx(0.75)
    assert 0.6 < low < mean < high < 0.9


def test_of_many_values_the_interval_is_that_of_the_normal_distribution(rng):
    values = rng.normal(3, 2, 400)
    mean, low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_two_scans_of_each_person_are_no_more_certain_than_one():
    people = [str(i) for i in range(12)]
    values = np.random.default_rng(1).normal(size=12)
    single = bootstrap_interval(values, people)
    doubled = bootstrap_interval(np.repeat(values, 2), np.repeat(people, 2))
    assert doubled == pytest.approx(single)
    as_if_strangers = bootstrap_interval(np.repeat(values, 2))
    assert as_if_strangers.high - as_if_strangers.low < 0.8 * (single.high - single.low)


def test_every_class_counts_alike_however_many_values_it_has():
    values, classes = [1.0, 1, 1, 1, 0], ["common"] * 4 + ["rare"]
    assert bootstrap_interval(values, classes=classes).mean == 0.5
    assert bootstrap_interval(values).mean == 0.8


def test_what_is_unknown_or_infinite_is_left_out():
    known = bootstrap_interval([0.1, 0.5, 0.9])
    assert bootstrap_interval([0.1, math.nan, 0.5, math.inf, 0.9]) == known


@pytest.mark.parametrize("values", [[], [math.nan], [0.5], [0.5, math.inf]], ids=str)
def test_fewer_than_two_groups_have_no_interval(values):
    mean, low, high = bootstrap_interval(values)
    assert mean == pytest.approx(0.5 if 0.5 in values else math.nan, nan_ok=True)
    assert math.isnan(low)
    assert math.isnan(high)


def test_the_seed_decides():
    values = np.random.default_rng(2).normal(size=20)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_repetitions_that_disagree_are_less_certain_than_those_that_agree():
    people = [str(i) for i in range(20)] * 3
    draws = [draw for draw in "abc" for _ in range(20)]
    noise = np.random.default_rng(3).normal(0, 0.1, 60)
    agreeing = bootstrap_interval(noise, people, draws=draws)
    disagreeing = bootstrap_interval(noise + np.repeat([-1, 0, 1], 20), people, draws=draws)
    assert disagreeing.mean == pytest.approx(agreeing.mean)
    assert disagreeing.high - disagreeing.low > 3 * (agreeing.high - agreeing.low)


def test_one_repetition_is_the_plain_interval():
    values, people = [1, 2, 5, 9], list("abcd")
    assert bootstrap_interval(values, people, draws=["x"] * 4) == bootstrap_interval(values, people)


def test_who_is_hard_in_every_repetition_keeps_the_mean_as_uncertain_as_one_repetition_does():
    rng = np.random.default_rng(4)
    people = [str(i) for i in range(12)]
    one = rng.normal(0, 1, 12)
    alone = bootstrap_interval(one, people)
    thrice = bootstrap_interval(np.tile(one, 3), people * 3, draws=list(np.repeat([*"abc"], 12)))
    strangers = bootstrap_interval(np.tile(one, 3), [f"{i}" for i in range(36)])
    assert thrice.high - thrice.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert strangers.high - strangers.low < 0.7 * (thrice.high - thrice.low)


def test_repetitions_without_a_common_person_have_an_interval():
    values, people = [0.1, 0.2, 0.7, 0.8], list("abcd")
    mean, low, high = bootstrap_interval(values, people, draws=list("xxyy"))
    assert mean == pytest.approx(0.45)
    assert 0.1 <= low < mean < high <= 0.8
