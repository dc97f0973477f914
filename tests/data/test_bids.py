"""BIDS folders with labels in a derivative."""

import gzip
import json
import shutil

import numpy as np
import pytest

from sammed3d_backbone.data.datasets import DatasetError, read_fold
from sammed3d_backbone.data.folders import find_dataset, read_dataset
from sammed3d_backbone.data.preparation import load_label, prepare_cases
from sammed3d_backbone.data.preprocessing import Preprocessing

STEMS = ("sub-01/ses-1/anat/sub-01_ses-1", "sub-01/ses-2/anat/sub-01_ses-2", "sub-02/anat/sub-02")
DERIVATIVE = "derivatives/manual"


@pytest.fixture
def bids(tmp_path, write_volume, labels):
    """Two subjects, one scanned twice, with two channels; label values have gaps."""
    for i, stem in enumerate(STEMS):
        for suffix in ("T1w", "FLAIR"):
            write_volume(f"{stem}_{suffix}.nii.gz", seed=i)
        write_volume(
            f"{DERIVATIVE}/{stem}_space-orig_desc-manual_dseg.nii.gz",
            np.array([0, 17, 53], np.uint8)[labels],
        )
    table = "index\tname\tcolor\n0\tbackground\t#000\n53\tright\t#f00\n17\tleft\t#0f0\n"
    (tmp_path / DERIVATIVE / "dseg.tsv").write_text(table)
    described = {"Name": "Toy", "BIDSVersion": "1.10.0", "License": "CC0"}
    (tmp_path / "dataset_description.json").write_text(json.dumps(described))
    return tmp_path


def test_a_bids_folder_is_read(bids):
    dataset = read_dataset(bids)
    assert (dataset.name, dataset.about) == ("Toy", {"licence": "CC0"})
    assert dataset.channels == ("FLAIR", "T1w")
    assert dataset.labels == {0: "background", 1: "left", 2: "right"}
    assert [case.id for case in dataset.cases] == ["sub-01_ses-1", "sub-01_ses-2", "sub-02"]
    assert [case.subject for case in dataset.cases] == ["sub-01", "sub-01", "sub-02"]
    assert [path.name for path in dataset.cases[2].images] == [
        "sub-02_FLAIR.nii.gz",
        "sub-02_T1w.nii.gz",
    ]


def test_its_values_become_class_numbers(bids, labels):
    case = read_dataset(bids).cases[0]
    assert np.array_equal(load_label(case).array, labels)
    plain = Preprocessing(None, {"default": "zscore_positive"}, "volume", (1, 1, 1))
    (prepared,) = prepare_cases(read_dataset(bids), [case.id], plain, progress=False)
    assert prepared.image.shape[0] == 2
    assert np.array_equal(prepared.label[0].numpy(), labels)


def test_its_sessions_stay_together_in_a_fold(bids):
    folds = [read_fold(read_dataset(bids), i, folds=2) for i in range(2)]
    assert {fold.val for fold in folds} == {("sub-01_ses-1", "sub-01_ses-2"), ("sub-02",)}


def test_a_channel_that_one_case_lacks_is_missed(bids):
    (bids / "sub-02/anat/sub-02_FLAIR.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"sub-02_FLAIR\.nii\.gz is missing; copy it or remove"):
        read_dataset(bids)


def test_an_image_that_is_there_twice_is_refused(bids):
    packed = bids / "sub-02/anat/sub-02_T1w.nii.gz"
    packed.with_name("sub-02_T1w.nii").write_bytes(gzip.decompress(packed.read_bytes()))
    with pytest.raises(DatasetError, match=r"sub-02_T1w\.nii "):
        read_dataset(bids)


def test_a_label_without_any_image_is_refused(bids):
    for path in bids.glob("sub-*/**/*.nii.gz"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"no image lies beside .*; add it"):
        read_dataset(bids)


def test_two_labelled_derivatives_are_one_too_many(bids, write_volume, labels):
    write_volume("derivatives/auto/sub-02/anat/sub-02_dseg.nii.gz", labels)
    with pytest.raises(DatasetError, match=r"2 folders .*\(auto, manual\)"):
        read_dataset(bids)


@pytest.mark.parametrize("content", [None, "index\n1\n", "index\tname\nx\ty\n", ""])
def test_labels_without_names_are_refused(bids, content):
    table = bids / DERIVATIVE / "dseg.tsv"
    if content is None:
        table.unlink()
    else:
        table.write_text(content)
    with pytest.raises(DatasetError, match=r"no names for the labels: write .*dseg\.tsv"):
        read_dataset(bids)


@pytest.mark.parametrize("row", ["17\tother", "18\tleft", "-1\tother", "18\t"])
def test_a_row_that_would_win_over_another_is_refused(bids, row):
    path = bids / DERIVATIVE / "dseg.tsv"
    path.write_text(f"index\tname\n17\tleft\n53\tright\n{row}\n")
    with pytest.raises(DatasetError, match=r"dseg\.tsv: "):
        read_dataset(bids)


def test_tables_that_disagree_are_refused(bids):
    own = bids / DERIVATIVE / "sub-02/anat/sub-02_dseg.tsv"
    own.write_text("index\tname\n17\tright\n53\tleft\n")
    with pytest.raises(DatasetError, match="name other classes; make them agree"):
        read_dataset(bids)


def test_a_description_that_is_no_object_is_refused(bids):
    (bids / "dataset_description.json").write_text("[]")
    with pytest.raises(DatasetError, match="JSON object"):
        read_dataset(bids)


@pytest.mark.parametrize("mark", ["\t", ",", ";"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_the_table_of_names_may_come_from_a_spreadsheet(bids, mark, encoding):
    path = bids / DERIVATIVE / "dseg.tsv"
    path.write_text(path.read_text().replace("\t", mark), encoding=encoding)
    assert read_dataset(bids).labels == {0: "background", 1: "left", 2: "right"}


@pytest.mark.parametrize("choice", ["*_desc-manual_dseg.nii.gz", "*desc-manual*"])
def test_one_of_several_labels_of_a_scan_is_chosen_by_its_name(bids, labels, choice):
    whole = read_dataset(bids)
    for path in list(bids.glob("derivatives/manual/**/*_dseg.nii.gz")):
        shutil.copy(path, path.with_name(path.name.replace("manual", "auto")))
    with pytest.raises(DatasetError, match="desc-auto"):
        read_dataset(bids)
    assert read_dataset(find_dataset(f"{bids}/{DERIVATIVE}/{choice}")) == whole


def test_one_of_several_derivatives_is_chosen_by_the_path(bids):
    whole = read_dataset(bids)
    shutil.copytree(bids / DERIVATIVE, bids / "derivatives" / "other")
    with pytest.raises(DatasetError, match=r"layout=FILE"):
        read_dataset(bids)
    assert read_dataset(find_dataset(f"{bids}/{DERIVATIVE}")) == whole


def test_labels_beside_the_anatomy_are_left_alone(bids, write_volume, labels):
    whole = read_dataset(bids)
    write_volume(f"{DERIVATIVE}/sub-02/func/sub-02_task-rest_dseg.nii.gz", labels)
    assert read_dataset(bids) == whole
