"""Predictions of cases -> scores, tables and comparisons."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest

from sammed3d_backbone.data.datasets import Case, Dataset
from sammed3d_backbone.data.volume import Volume
from sammed3d_backbone.evaluation.metrics import METRICS, hausdorff95_mm, surface_dice
from sammed3d_backbone.evaluation.scores import (
    COLUMNS,
    OVERALL,
    Score,
    case_means,
    class_table,
    paired_differences,
    read_scores,
    score_cases,
    summarise_scores,
    write_scores,
)

CLASSES = ("head", "tail")


def score_of(case, subject, name, *values, **flags):
    return Score(case, subject, name, dict(zip(METRICS, values, strict=False)), **flags)


SCORES = [
    score_of("a", "anna", "head", 1.0, 0.9, 1.5),
    score_of("a", "anna", "tail", 0.5, 0.4, 3.0, truncated=True),
    score_of("b", "bert", "head", 0.5, 0.3, 2.5),
    score_of("b", "bert", "tail", math.nan, annotated=False),
    score_of("c", "cleo", "head", 0.0, 0.0, math.inf),
    score_of("c", "cleo", "tail", 0.7, 0.8, 2.0),
]
AFFINE = np.diag([1.0, 1.0, 2.5, 1.0])


@pytest.fixture
def dataset(tmp_path):
    """Two cases with a head below a tail; in the second only the head was looked for."""
    label = np.zeros((12, 12, 12), np.uint8)
    label[3:9, 3:9, 2:5], label[3:9, 3:9, 5:10] = 1, 2
    for name in "ab":
        Volume(label, AFFINE).save(tmp_path / f"{name}.nii.gz")
    paths = {name: tmp_path / f"{name}.nii.gz" for name in "ab"}
    cases = (
        Case("a", (paths["a"],), paths["a"], truncated=("tail",), subject="anna"),
        Case("b", (paths["b"],), paths["b"], annotated=("head",)),
    )
    labels = dict(enumerate(("background", *CLASSES)))
    return Dataset("Toy", tmp_path, labels, ("MRI",), cases)


def shifted(case):
    """A prediction that is one voxel, 2.5 mm, too high."""
    label = Volume.load(case.label)
    return dataclasses.replace(label, array=np.roll(label.array, 1, axis=2).astype(np.uint8))


def test_cases_are_scored_on_their_own_grid_and_predictions_kept(dataset, tmp_path):
    scores = score_cases(shifted, dataset, ["b", "a"], folder=tmp_path / "kept", progress=False)
    assert [(s.case, s.name) for s in scores] == [(c, n) for c in "ba" for n in CLASSES]
    head = scores[2]
    assert head["dice"] == pytest.approx(2 / 3)
    assert head["hd95_mm"] == 2.5
    assert 0 < head["nsd"] < 1
    assert (head.subject, scores[0].subject) == ("anna", "b")
    kept = Volume.load(tmp_path / "kept/a.nii.gz")
    assert np.array_equal(kept.array, shifted(dataset.cases[0]).array)


def test_the_tolerance_is_of_the_surface_dice(dataset):
    (head, *_) = score_cases(shifted, dataset, ["a"], tolerance_mm=2.5, progress=False)
    assert head["nsd"] == 1


def test_what_was_not_looked_for_has_no_score_and_what_is_cut_off_is_flagged(dataset):
    scores = score_cases(shifted, dataset, ["a", "b"], progress=False)
    assert [s.annotated for s in scores] == [True, True, True, False]
    assert [s.truncated for s in scores] == [False, True, False, False]
    assert np.isnan([scores[3]["dice"], scores[3]["nsd"], scores[3]["hd95_mm"]]).all()


def test_a_prediction_on_another_grid_is_refused(dataset):
    def elsewhere(case):
        return dataclasses.replace(shifted(case), affine=AFFINE + np.diag([0.5, 0, 0, 0]))

    with pytest.raises(ValueError, match=r"prediction of a: lies up to 5\.5 mm away"):
        score_cases(elsewhere, dataset, ["a"], progress=False)


def test_values_that_are_no_classes_are_refused(dataset):
    def wild(case):
        label = Volume.load(case.label)
        return dataclasses.replace(label, array=np.full(label.shape, 7, np.int16))

    with pytest.raises(ValueError, match=r"values \[7\] are not classes of Toy.*number them"):
        score_cases(wild, dataset, ["a"], progress=False)


def test_the_boxes_that_classes_are_scored_in_change_nothing(dataset, rng):
    noise = rng.integers(0, 3, (12, 12, 12)).astype(np.uint8)
    noise[:, :, 6:] = 0

    def noisy(case):
        return dataclasses.replace(Volume.load(case.label), array=noise)

    label = Volume.load(dataset.cases[0].label).array
    for value, score in enumerate(score_cases(noisy, dataset, ["a"], progress=False), start=1):
        masks = noise == value, label == value
        assert score["dice"] == pytest.approx(
            2 * (masks[0] & masks[1]).sum() / sum(map(np.sum, masks))
        )
        assert score["nsd"] == surface_dice(*masks, (1.0, 1.0, 2.5), 2.0)
        assert score["hd95_mm"] == hausdorff95_mm(*masks, (1.0, 1.0, 2.5))


def test_a_class_in_neither_has_no_score(dataset):
    def nothing(case):
        label = Volume.load(case.label)
        return dataclasses.replace(label, array=np.zeros(label.shape, np.uint8))

    empty = dataclasses.replace(
        dataset, cases=dataset.cases[:1], labels={**dataset.labels, 3: "ear"}
    )
    *both, ear = score_cases(nothing, empty, ["a"], progress=False)
    assert [score["hd95_mm"] for score in both] == [math.inf, math.inf]
    assert np.isnan([ear["dice"], ear["nsd"], ear["hd95_mm"]]).all()
    assert ear.annotated


def test_classes_are_averaged_over_cases_and_then_over_each_other():
    assert summarise_scores(SCORES, CLASSES) == {
        "mean_dice": 0.55,
        "dice": {"head": 0.5, "tail": 0.6},
        "cases": 3,
    }


def test_no_known_score_is_none():
    assert summarise_scores([score_of("a", "a", "head", math.nan)], ("head",))["mean_dice"] is None


def test_the_table_has_every_class_and_their_mean():
    head, tail, overall = class_table(SCORES, CLASSES)
    assert (head.name, head.cases, head.one_sided) == ("head", 3, 1)
    assert (tail.cases, tail.one_sided, overall.name) == (2, 0, OVERALL)
    assert head.values["nsd"].mean == pytest.approx(0.4)
    assert head.values["hd95_mm"].mean == 2.0  # mean of the two that are finite
    assert overall.values["dice"].mean == pytest.approx(0.55)
    assert head.values["dice"].low < head.values["dice"].mean < head.values["dice"].high


def test_the_best_case_comes_first_and_one_without_scores_last():
    unknown = score_of("d", "d", "head", math.nan)
    assert case_means([unknown, *SCORES]) == pytest.approx(
        {"a": 0.75, "b": 0.5, "c": 0.35, "d": math.nan}, nan_ok=True
    )
    assert list(case_means([unknown, *SCORES])) == ["a", "b", "c", "d"]


def test_a_comparison_is_paired(tmp_path):
    better = [dataclasses.replace(s, values=dict(s.values, dice=s["dice"] + 0.1)) for s in SCORES]
    gain = class_table(paired_differences(better, SCORES), CLASSES)[0].values["dice"]
    assert gain == pytest.approx((0.1, 0.1, 0.1))


def test_a_comparison_of_other_cases_is_refused():
    with pytest.raises(ValueError, match=r"1 scores have no partner, e\.g\. c tail; compare"):
        paired_differences(SCORES, SCORES[:-1])


def test_the_tables_hold_every_case(tmp_path):
    summary = write_scores(tmp_path / "new", SCORES, CLASSES, {"seed": 3})
    with (tmp_path / "new/scores.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(COLUMNS)
    assert rows[1] == ["a", "anna", "head", "1", "0.9", "1.5", "yes", "no"]
    assert rows[2][-2:] == ["yes", "yes"]
    assert rows[4] == ["b", "bert", "tail", "", "", "", "no", "no"]
    assert rows[5][3:6] == ["0", "0", "inf"]
    written = json.loads((tmp_path / "new/scores.json").read_text())
    assert written == summary
    assert written["seed"] == 3
    head, tail, _ = written["tables"]["all"]
    assert (head["class"], head["one_sided"]) == ("head", 1)
    assert tail["dice"][0] == pytest.approx(0.6)
    _, whole_tail, _ = written["tables"]["without truncated"]
    assert whole_tail["dice"] == [0.7, None, None]


def test_scores_come_back_from_their_table(tmp_path):
    write_scores(tmp_path, SCORES, CLASSES, {})
    for given, read in zip(SCORES, read_scores(tmp_path / "scores.csv"), strict=True):
        assert [read[m] for m in METRICS] == pytest.approx([given[m] for m in METRICS], nan_ok=True)
        assert dataclasses.replace(read, values={}) == dataclasses.replace(given, values={})


def test_another_table_is_refused(tmp_path):
    (tmp_path / "scores.csv").write_text("case,dice_head\na,0.5\n")
    with pytest.raises(ValueError, match=r"has no columns case, subject.*score the cases again"):
        read_scores(tmp_path / "scores.csv")
    with pytest.raises(FileNotFoundError, match=r"score the cases with recipes/evaluate\.py"):
        read_scores(tmp_path / "none.csv")


@pytest.mark.parametrize("change", [lambda t: t[:-8], lambda t: t[:-1] + ",1\n", lambda t: t * 2])
def test_a_table_whose_rows_are_cut_or_come_twice_is_refused(tmp_path, change):
    write_scores(tmp_path, SCORES, CLASSES, {})
    header, rows = (tmp_path / "scores.csv").read_text().split("\n", 1)
    (tmp_path / "scores.csv").write_text(f"{header}\n{change(rows)}")
    with pytest.raises(ValueError, match="rows"):
        read_scores(tmp_path / "scores.csv")


def test_the_failure_of_one_case_leaves_the_scores_of_the_others(dataset):
    def sometimes(case):
        if case.id == "a":
            raise IndexError("of a library")
        return shifted(case)

    failed = {}
    scores = score_cases(sometimes, dataset, ["a", "b"], failed=failed, progress=False)
    assert {score.case for score in scores} == {"b"}
    assert failed.keys() == {"a"}
    assert "of a library" in failed["a"]


def test_regions_are_scored_as_unions_outside_of_what_is_to_be_ignored(dataset):
    label = Volume.load(dataset.cases[0].label)
    label.array[0] = 3
    label.save(dataset.cases[0].label)
    of_regions = dataclasses.replace(
        dataset, regions={"whole": (1, 2), "core": (2,)}, has_ignore=True
    )

    def all_tail(case):
        return dataclasses.replace(label, array=np.where(label.array > 0, 2, 0).astype(np.uint8))

    whole, core = score_cases(all_tail, of_regions, ["a"], progress=False)
    assert (whole.name, whole["dice"], whole["hd95_mm"]) == ("whole", 1, 0)
    tail = 6 * 6 * 5
    assert (core.name, core["dice"]) == ("core", pytest.approx(2 * tail / (2 * tail + 6 * 6 * 3)))
