"""Folders in the layouts people have, what is wrong with them, and folds."""

import itertools
import json
import re

import numpy as np
import pytest

from sammed3d_backbone.data.datasets import (
    DatasetError,
    few_subjects,
    find_dataset,
    label_problems,
    pair_problems,
    read_dataset,
    read_fold,
    with_subjects,
)
from sammed3d_backbone.data.volume import Volume


def test_a_decathlon_folder_is_read(decathlon):
    dataset = read_dataset(decathlon(note="a toy", reference="nobody"))
    assert [case.id for case in dataset.cases] == ["case_0", "case_1", "case_2", "case_3"]
    assert dataset.labels == {0: "background", 1: "head", 2: "tail"}
    assert dataset.classes == ("head", "tail")
    assert dataset.channels == ("MRI",)
    assert (dataset.note, dataset.about) == ("a toy", {"reference": "nobody"})


def test_an_nnunet_2_folder_is_read(nnunet):
    dataset = read_dataset(nnunet())
    assert dataset.channels == ("T1", "FLAIR")
    assert dataset.labels == {0: "background", 1: "head", 2: "tail"}
    assert [path.name for path in dataset.cases[1].images] == [
        "case_1_0000.nii.gz",
        "case_1_0001.nii.gz",
    ]


def test_files_that_a_mac_leaves_behind_are_no_cases(nnunet):
    folder = nnunet()
    (folder / "labelsTr" / "._case_0.nii.gz").write_bytes(b"")
    assert len(read_dataset(folder).cases) == 3


def test_an_nnunet_1_folder_lists_cases_and_has_a_file_per_channel(nnunet):
    training = [
        {"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"}
        for i in range(3)
    ]
    dataset = read_dataset(nnunet(training=training))
    assert [path.name for path in dataset.cases[0].images] == [
        "case_0_0000.nii.gz",
        "case_0_0001.nii.gz",
    ]


def test_what_was_annotated_and_what_is_cut_off_is_kept(decathlon):
    folder = decathlon(cases=1)
    info = json.loads((folder / "dataset.json").read_text())
    info["training"][0] |= {"annotated": ["head"], "truncated": ["head"]}
    (folder / "dataset.json").write_text(json.dumps(info))
    (case,) = read_dataset(folder).cases
    assert (case.annotated, case.truncated) == (("head",), ("head",))


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"labels": None}, "name the values, as"),
        ({"labels": {"background": 0, "both": [1, 2]}}, "give one value per class"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, 'give those cases as "annotated"'),
        ({"labels": {"0": "background", "2": "b"}}, "number them 0, 1, 2"),
        ({"training": [{"image": "x.nii.gz"}]}, "add both paths"),
        ({"training": []}, "put them into"),
        ({"modality": ["MRI"]}, "the channels are not numbered; give them as"),
        ({"modality": {"1": "MRI"}}, "the channels are not numbered"),
    ],
)
def test_a_description_that_does_not_do_is_refused(decathlon, changes, remedy):
    with pytest.raises(DatasetError, match=remedy):
        read_dataset(decathlon(**changes))


def test_files_in_another_format_are_to_be_converted(nnunet):
    with pytest.raises(DatasetError, match=r"convert them to \.nii\.gz"):
        read_dataset(nnunet(file_ending=".nrrd"))


def test_a_case_listed_twice_is_refused(decathlon):
    folder = decathlon(cases=1)
    info = json.loads((folder / "dataset.json").read_text())
    info["training"] *= 2
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match="case_0 is listed twice; remove one"):
        read_dataset(folder)


def test_an_annotated_class_that_does_not_exist_is_refused(decathlon):
    folder = decathlon(cases=1)
    info = json.loads((folder / "dataset.json").read_text())
    info["training"][0]["annotated"] = ["neck"]
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match=r"\['neck'\] are no classes.*mend dataset\.json"):
        read_dataset(folder)


@pytest.mark.parametrize("layout", ["decathlon", "nnunet"])
def test_all_missing_files_are_named_at_once(layout, request):
    folder = request.getfixturevalue(layout)()
    gone = sorted((folder / "imagesTr").iterdir())[:2]
    for path in gone:
        path.unlink()
    with pytest.raises(DatasetError, match="copy it or remove the case") as caught:
        read_dataset(folder)
    for path in gone:
        assert str(path) in str(caught.value)


def test_a_folder_without_description_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass the folder that holds it"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_description_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text, encoding="latin-1")
    with pytest.raises(DatasetError, match="mend it"):
        read_dataset(tmp_path)


def test_a_data_set_is_found_by_path_or_by_name(decathlon, monkeypatch, tmp_path):
    folder = decathlon()
    assert find_dataset(str(folder)) == folder
    monkeypatch.setenv("SAMMED3D_DATA", str(folder.parent))
    monkeypatch.chdir(tmp_path.parent.parent)
    assert find_dataset(folder.name) == folder


def test_a_data_set_that_is_nowhere_says_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("SAMMED3D_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no_such_set.*set SAMMED3D_DATA"):
        find_dataset("no_such_set")


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
        ({"train": ["case_0"], "val": ["case_9"]}, r"\['case_9'\], which are no cases; remove"),
        ({"train": ["case_0"], "val": ["case_0"]}, "keep them in one"),
        ({"train": ["case_0"], "val": []}, "deal again"),
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
        assert "dealt by case into 4 folds" in fold.rule
    assert folds == [read_fold(dataset, i, folds=4, seed=7) for i in range(4)]


def test_a_fold_that_does_not_exist_is_refused(decathlon):
    with pytest.raises(ValueError, match="there are 2, counted from 0"):
        read_fold(read_dataset(decathlon()), 2, folds=2)


def test_too_few_cases_to_deal_are_refused(decathlon):
    with pytest.raises(
        DatasetError, match=r"pass folds= between 2 and that, or write splits\.json"
    ):
        read_fold(read_dataset(decathlon()), 0, folds=5)


def labels_with(value):
    array = np.zeros((4, 4, 4))
    array[0, 0, 0] = value
    return array


@pytest.mark.parametrize(
    ("array", "remedy"),
    [
        (labels_with(1), None),
        (labels_with(9), r"values \[9\] are not in dataset\.json.*add or mend"),
        (labels_with(-1), r"values \[-1\]"),
        (labels_with(0.5), "save them as integers"),
        (labels_with(np.nan), "save them as integers"),
        (labels_with(0), "remove the case or label it"),
        (np.ones((2, 4, 4, 4)), "save one integer volume"),
    ],
)
def test_a_label_volume_is_checked(tmp_path, array, remedy):
    problems = label_problems(tmp_path, Volume(array, np.eye(4)), {0: "background", 1: "head"})
    if remedy is None:
        assert problems == []
    else:
        (problem,) = problems
        assert problem.startswith(str(tmp_path))
        assert re.search(remedy, problem)


def test_a_grid_that_differs_in_the_fourth_decimal_is_the_same_grid(tmp_path):
    moved = np.eye(4)
    moved[0, 3] += 4e-4
    image, label = Volume(np.zeros((4, 4, 4)), moved), Volume(np.zeros((4, 4, 4)), np.eye(4))
    assert pair_problems(tmp_path, image, label) == []


@pytest.mark.parametrize(
    ("image", "remedy"),
    [
        (Volume(np.zeros((4, 4, 5)), np.eye(4)), "resample one"),
        (Volume(np.zeros((4, 4, 4)), np.diag([1.1, 1, 1, 1])), r"lies up to 0\.3 mm.*mend one"),
        (Volume(np.full((4, 4, 4), np.inf), np.eye(4)), "replace those voxels"),
    ],
)
def test_an_image_that_does_not_lie_on_its_label_is_reported(tmp_path, image, remedy):
    (problem,) = pair_problems(tmp_path, image, Volume(np.zeros((4, 4, 4)), np.eye(4)))
    assert re.search(remedy, problem)


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
    path.write_text('{"case_0": "a", "case_1": "a", "case_2": "b", "case_3": "b"}')
    assert [case.subject for case in with_subjects(dataset, path).cases] == ["a", "a", "b", "b"]


@pytest.fixture
def of_pairs(decathlon, tmp_path):
    """Twenty cases of ten people."""
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
