"""Folds, subjects and subsets of a data set."""

import itertools
import json
from dataclasses import replace

import pytest

from sammed3d_backbone.data.datasets import (
    DatasetError,
    class_names,
    few_subjects,
    read_fold,
    with_subjects,
)
from sammed3d_backbone.data.folders import read_dataset


@pytest.mark.parametrize(
    ("pairs", "named"),
    [
        ([(0, "background"), (1, "head"), (1, "tail")], "'head' and 'tail'"),
        ([(1, "head"), (2, "head")], "head"),
        ([(1, "background")], "background"),
        ([(-1, "head")], "-1"),
        ([(True, "head")], "True"),
        ([(1.0, "head")], "1.0"),
        ([(1, " ")], "value 1"),
        ([(1, None)], "None"),
        ([(1, "x" * 201)], "value 1"),
        ([(1, "\ud800")], "value 1"),
    ],
)
def test_no_name_or_value_of_a_class_wins_over_another(pairs, named):
    problems = []
    class_names(pairs, problems)
    assert named in problems[0]


def test_a_name_of_value_0_that_is_not_background_is_said(caplog):
    problems = []
    assert class_names([(0, "head"), (1, "tail")], problems) == {0: "head", 1: "tail"}
    assert problems == []
    assert "head" in caplog.text


@pytest.mark.parametrize("split", ["valid", "TRAIN", ""])
def test_a_case_of_an_unknown_split_is_not_left_out_unsaid(nnunet, split):
    folder = nnunet()
    entries = {
        path.name.removesuffix(".nii.gz"): {
            "images": [f"imagesTr/{path.name.removesuffix('.nii.gz')}_0000.nii.gz"],
            "label": f"labelsTr/{path.name}",
            "split": "train" if number else split,
        }
        for number, path in enumerate(sorted((folder / "labelsTr").iterdir()))
    }
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**info, "dataset": entries}))
    with pytest.raises(DatasetError, match=f"case_0 has split '{split}'"):
        read_dataset(folder)


def test_given_splits_are_taken(decathlon):
    folder = decathlon()
    splits = {"rule": "by hand", "folds": [{"train": ["case_0", "case_3"], "val": ["case_2"]}]}
    (folder / "splits.json").write_text(json.dumps(splits))
    fold = read_fold(read_dataset(folder), 0)
    assert (fold.train, fold.val) == (("case_0", "case_3"), ("case_2",))
    assert fold.rule == "splits.json: by hand"


def test_nnunets_list_of_splits_is_taken(decathlon):
    folder = decathlon()
    (folder / "splits.json").write_text(json.dumps([{"train": ["case_0"], "val": ["case_1"]}]))
    assert read_fold(read_dataset(folder), 0).train == ("case_0",)


@pytest.mark.parametrize(
    ("fold", "remedy"),
    [
        ({"train": ["case_0"], "val": ["case_9"]}, "case_9"),
        ({"train": ["case_0"], "val": ["case_0"]}, "keep them in one"),
        ({"train": ["case_0"], "val": []}, "split again"),
        ({"train": ["case_0", "case_0"], "val": ["case_1"]}, r"lists \['case_0'\] twice; remove"),
    ],
)
def test_splits_that_do_not_fit_are_refused(decathlon, fold, remedy):
    folder = decathlon()
    (folder / "splits.json").write_text(json.dumps([fold]))
    with pytest.raises(DatasetError, match=remedy):
        read_fold(read_dataset(folder), 0)


@pytest.mark.parametrize("content", [{}, {"folds": 3}, [["case_0"]], [{"train": ["case_0"]}]])
def test_splits_of_another_form_are_refused(decathlon, content):
    folder = decathlon()
    (folder / "splits.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="give a list of"):
        read_fold(read_dataset(folder), 0)


def test_without_splits_every_case_is_dealt_once_and_always_alike(decathlon):
    dataset = read_dataset(decathlon())
    folds = [read_fold(dataset, i, folds=4, seed=7) for i in range(4)]
    assert sorted(name for fold in folds for name in fold.val) == [c.id for c in dataset.cases]
    for fold in folds:
        assert not set(fold.train) & set(fold.val)
        assert "4 random folds by subject" in fold.rule
    assert folds == [read_fold(dataset, i, folds=4, seed=7) for i in range(4)]


def test_a_fold_that_does_not_exist_is_refused(decathlon):
    with pytest.raises(ValueError, match="there are 2, counted from 0"):
        read_fold(read_dataset(decathlon()), 2, folds=2)


def test_too_few_cases_to_deal_are_refused(decathlon):
    with pytest.raises(
        DatasetError, match=r"pass folds= between 2 and that, or write splits\.json"
    ):
        read_fold(read_dataset(decathlon()), 0, folds=5)


def test_a_case_is_its_own_subject_unless_dataset_json_says_otherwise(decathlon):
    folder = decathlon(cases=2)
    info = json.loads((folder / "dataset.json").read_text())
    info["training"][0]["subject"] = "anna"
    (folder / "dataset.json").write_text(json.dumps(info))
    assert [case.subject for case in read_dataset(folder).cases] == ["anna", "case_1"]


def test_a_file_of_subjects_names_one_for_every_case(decathlon, tmp_path):
    dataset = read_dataset(decathlon())
    path = tmp_path / "subjects.json"
    with pytest.raises(FileNotFoundError, match="pass subjects= a JSON file"):
        with_subjects(dataset, path)
    path.write_text('["case_0"]')
    with pytest.raises(DatasetError, match=r'give \{"case": "subject"'):
        with_subjects(dataset, path)
    path.write_text('{"case_0": "a", "case_1": "a", "case_2": "b"}')
    with pytest.raises(DatasetError, match="case_3 has no subject; add it"):
        with_subjects(dataset, path)
    path.write_text('{"case_0": "a", "case_1": "a", "case_2": "b", "case_3": null}')
    with pytest.raises(DatasetError, match="case_3 has the subject None"):
        with_subjects(dataset, path)
    path.write_text('{"case_0": 0, "case_1": 0, "case_2": 1, "case_3": 1}')
    assert [case.subject for case in with_subjects(dataset, path).cases] == ["0", "0", "1", "1"]
    path.write_text('{"case_0": "a", "case_1": "a", "case_2": "b", "case_3": "b"}')
    assert [case.subject for case in with_subjects(dataset, path).cases] == ["a", "a", "b", "b"]


@pytest.fixture
def of_pairs(decathlon, tmp_path):
    """Twenty cases of ten subjects."""
    (tmp_path / "subjects.json").write_text(
        json.dumps({f"case_{i}": f"person_{i // 2}" for i in range(20)})
    )
    return with_subjects(read_dataset(decathlon(cases=20)), tmp_path / "subjects.json")


@pytest.mark.parametrize("seed", range(3))
def test_subsets_of_subjects_are_whole_and_nested(of_pairs, seed):
    ids = [case.id for case in of_pairs.cases]
    subsets = [set(few_subjects(of_pairs, ids, n, seed)) for n in range(1, 11)]
    assert [len(subset) for subset in subsets] == list(range(2, 21, 2))
    for fewer, more in itertools.pairwise(subsets):
        assert fewer < more


def test_seeds_draw_different_subjects_and_the_order_of_cases_does_not_matter(of_pairs):
    ids = [case.id for case in of_pairs.cases]
    drawn = {frozenset(few_subjects(of_pairs, ids, 2, seed)) for seed in range(8)}
    assert len(drawn) > 4
    assert few_subjects(of_pairs, ids[::-1], 2, 0) == few_subjects(of_pairs, ids, 2, 0)[::-1]


@pytest.mark.parametrize("number", [0, 11])
def test_more_subjects_than_there_are_is_refused(of_pairs, number):
    with pytest.raises(ValueError, match="give 1 to 10, or null for all"):
        few_subjects(of_pairs, [case.id for case in of_pairs.cases], number, 0)


def with_split(folder, split):
    """A Decathlon folder whose last two cases are one person's, and its splits.json."""
    info = json.loads((folder / "dataset.json").read_text())
    for entry in info["training"][2:]:
        entry["subject"] = "twin"
    (folder / "dataset.json").write_text(json.dumps(info))
    if split:
        (folder / "splits.json").write_text(json.dumps(split))
    return read_dataset(folder)


def test_a_person_on_both_sides_of_a_split_is_refused(decathlon):
    split = [{"train": ["case_0", "case_2"], "val": ["case_1", "case_3"]}]
    with pytest.raises(
        DatasetError, match=r"subjects \['twin'\] in train and val; keep each in one"
    ):
        read_fold(with_split(decathlon(), split), 0)


def test_a_case_validated_in_two_folds_is_refused(decathlon):
    split = [{"train": [f"case_{i}"], "val": ["case_1"]} for i in (0, 2)]
    with pytest.raises(DatasetError, match="case_1 is in val of 2 folds; keep it in one"):
        read_fold(with_split(decathlon(), split), 0)


def test_a_person_is_dealt_to_one_side(decathlon):
    dataset = with_split(decathlon(), None)
    folds = [read_fold(dataset, i, folds=3) for i in range(3)]
    assert sorted(name for fold in folds for name in fold.val) == [c.id for c in dataset.cases]
    for fold in folds:
        assert len({"case_2", "case_3"} & set(fold.val)) != 1


def test_the_published_split_is_taken_and_its_test_cases_stay_out(decathlon):
    dataset = read_dataset(decathlon())
    parts = ("train", "val", "test", "train")
    cases = [replace(c, split=part) for c, part in zip(dataset.cases, parts, strict=True)]
    fold = read_fold(replace(dataset, cases=tuple(cases)), 0)
    assert (fold.train, fold.val) == (("case_0", "case_3"), ("case_1",))
    assert fold.rule == "the split that came with the data"


def test_a_published_split_that_cannot_be_used_names_the_way_out(decathlon):
    dataset = read_dataset(decathlon())
    cases = tuple(replace(case, split="train") for case in dataset.cases)
    with pytest.raises(DatasetError, match=r"write .*splits\.json to split in another way"):
        read_fold(replace(dataset, cases=cases), 0)
