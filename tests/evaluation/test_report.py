"""Scores of many cases -> tables."""

import csv
import json
import math

import pytest

from sammed3d_backbone.evaluation.report import CaseScores, summarise, write_scores

SCORES = [CaseScores("a", (1.0, 0.5)), CaseScores("b", (0.5, math.nan))]


def test_classes_are_averaged_over_cases_and_then_over_each_other():
    summary = summarise(SCORES, ("head", "tail"))
    assert summary == {"mean_dice": 0.625, "dice": {"head": 0.75, "tail": 0.5}, "cases": 2}


def test_the_mean_of_a_case_is_over_the_classes_it_has():
    assert [score.mean for score in SCORES] == [0.75, 0.5]


def test_no_known_score_is_none():
    assert summarise([CaseScores("a", (math.nan,))], ("head",))["mean_dice"] is None


def test_the_tables_hold_every_case(tmp_path):
    summary = write_scores(tmp_path / "new", SCORES, ("head", "tail"), {"seed": 3})
    with (tmp_path / "new" / "scores.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["case", "dice_head", "dice_tail", "dice_mean"],
        ["a", "1.000000", "0.500000", "0.750000"],
        ["b", "0.500000", "", "0.500000"],
    ]
    written = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert written["per_case"] == {
        "a": {"head": 1.0, "tail": 0.5},
        "b": {"head": 0.5, "tail": None},
    }
    assert written["seed"] == 3
    assert written["mean_dice"] == summary["mean_dice"] == pytest.approx(0.625)
