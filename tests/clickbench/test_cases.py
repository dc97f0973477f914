"""Targets of data sets in every layout."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sammed3d_backbone.clickbench.cases import (
    MODEL_MASKS,
    ClickSet,
    read_click_set,
    read_npz,
)
from sammed3d_backbone.data.datasets import DatasetError, LabelledCase
from sammed3d_backbone.data.volume import Volume


def targets(click_set, **changed):
    click_set = replace(click_set, **changed)
    return [target for case in click_set.cases for target in click_set.targets(case)]


def test_a_labels_json_gives_named_targets(data):
    found = targets(read_click_set(data))
    assert [(t.case, t.name, int(t.truth.sum())) for t in found] == [
        ("v1", "block", 6 * 6 * 6),
        ("v1", "dot", 1),
        ("v2", "block", 7 * 6 * 6),
        ("v2", "dot", 1),
    ]
    assert {t.modality for t in found} == {"ct"}
    assert found[0].image is found[1].image  # so that the volume is set once


def test_masks_that_a_model_made_are_said_to_be(data):
    assert read_click_set(data).note == MODEL_MASKS


@pytest.mark.parametrize("name", ["hippocampus", "headneck_ct"])
def test_a_data_set_of_any_known_layout_gives_targets(shared_data, name):
    click_set = read_click_set(shared_data / name).selected(cases=1)
    found = targets(click_set)
    assert len(found) >= 2
    assert found[0].modality == {"hippocampus": "mr", "headneck_ct": "ct"}[name]


def test_every_single_volume_gives_targets(shared_data):
    for folder in sorted((shared_data / "singles").iterdir()):
        assert read_click_set(folder).cases


def npz(path, spacing=(5.0, 1.0, 2.0), **arrays):
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[1, 2, 3] = 6
    arrays = {"imgs": labels * 20, "gts": labels, "spacing": np.array(spacing), **arrays}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("spacing_is_xyz", "expected_mm"), [(False, (2.0, 1.0, 5.0)), (True, (5.0, 1.0, 2.0))]
)
def test_an_archive_of_the_challenge_is_read_either_way(tmp_path, spacing_is_xyz, expected_mm):
    # imgs[z, y, x]; the evaluator takes spacing as z, y, x.
    npz(tmp_path / "CT_1.npz")
    (target,) = targets(read_click_set(tmp_path), spacing_is_xyz=spacing_is_xyz)
    assert target.image.spacing_mm == expected_mm
    assert target.name == "6"
    assert np.argwhere(target.truth).tolist() == [[3, 2, 1]]
    assert target.image.array[3, 2, 1] == 120


@pytest.mark.parametrize("change", [{"gts": None}, {"gts": np.zeros((3, 4, 6), int)}])
def test_another_archive_is_refused(tmp_path, change):
    npz(tmp_path / "a.npz", **change)
    with pytest.raises(DatasetError, match=r"give (imgs, gts and spacing|one grid)"):
        targets(read_click_set(tmp_path))


def test_classes_and_cases_can_be_chosen(data):
    chosen = read_click_set(data).selected(cases=1, classes=["dot"])
    assert [(t.case, t.name) for t in targets(chosen)] == [("v1", "dot")]


def test_classes_of_an_archive_are_chosen_by_number(tmp_path):
    npz(tmp_path / "a.npz")
    assert [t.name for t in targets(read_click_set(tmp_path).selected(classes=["6"]))] == ["6"]
    assert not targets(read_click_set(tmp_path).selected(classes=["5"]))


def test_an_unknown_class_is_refused_with_those_there_are(data):
    with pytest.raises(ValueError, match="choose among block, dot"):
        read_click_set(data).selected(classes=["liver"])


def test_the_hash_is_that_of_the_files_wherever_they_lie(data, tmp_path):
    before = read_click_set(data).content_sha256()
    moved = tmp_path / "elsewhere" / "made"
    shutil.copytree(data, moved)
    assert read_click_set(moved).content_sha256() == before
    assert read_click_set(moved).selected(cases=1).content_sha256() != before


def test_a_label_on_another_grid_is_refused(data):
    nib.save(nib.Nifti1Image(np.ones((16, 14, 11), np.uint8), np.eye(4)), data / "v1_seg.nii.gz")
    with pytest.raises(DatasetError, match="resample one"):
        targets(read_click_set(data))


def test_several_channels_are_refused(data):
    nib.save(
        nib.Nifti1Image(np.ones((16, 14, 12, 2)), np.diag([-1.0, 1, 2, 1])), data / "v1.nii.gz"
    )
    with pytest.raises(DatasetError, match="of the channel to be segmented"):
        targets(read_click_set(data))


def test_a_labels_json_is_found_by_its_name_below_the_data_folder(data, monkeypatch):
    monkeypatch.setenv("SAMMED3D_DATA", str(data.parent))
    assert read_click_set(data.name).cases == read_click_set(data).cases


def test_a_labels_json_of_another_kind_is_refused(data):
    (data / "labels.json").write_text('[{"image": "v1.nii.gz"}]')
    with pytest.raises(DatasetError, match="give a list of"):
        read_click_set(data)


def test_a_folder_without_any_layout_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass data=FOLDER"):
        read_click_set(tmp_path)


def test_labels_that_a_case_lacks_are_no_targets(data):
    (case, _) = read_click_set(data).cases
    asked = ClickSet("made", (LabelledCase(case.case, {7: "block", 8: "absent"}),))
    assert [target.name for target in targets(asked)] == ["block"]


def test_connected_parts_can_be_targets_of_their_own(data):
    # Stored towards L, A, S: the part at the end of the first axis lies furthest left.
    labels = np.zeros((16, 14, 12), np.uint8)
    labels[1:4, 1:4, 1:4] = labels[3:5, 4:6, 4:6] = labels[10:14, 2:6, 2:6] = 7
    nib.save(nib.Nifti1Image(labels, np.diag([-1.0, 1, 2, 1])), data / "v1_seg.nii.gz")
    found = targets(read_click_set(data).selected(cases=1, classes=["block"]), instances=True)
    assert [(t.name, int(t.truth.sum())) for t in found] == [
        ("block 1", 4 * 4 * 4),
        ("block 2", 27 + 8),  # they touch at a corner
    ]


def test_subjects_and_places_of_files_can_be_told(tmp_path):
    for name in ("p1_left", "p1_right"):
        for kind, array in (("image", np.arange(64)), ("mask", np.ones(64))):
            volume = nib.Nifti1Image(array.astype(np.uint8).reshape(4, 4, 4), np.eye(4))
            nib.save(volume, tmp_path / f"{name}_{kind}.nii.gz")
    layout, subjects = tmp_path / "layout.yaml", tmp_path / "subjects.json"
    layout.write_text(
        "name: cubes\nchannels: [MR]\nclasses: [cube]\n"
        "images: ['{case}_image.nii.gz']\nlabel: '{case}_mask.nii.gz'\n"
    )
    subjects.write_text('{"p1_left": "p1", "p1_right": "p1"}')
    found = targets(read_click_set(tmp_path, layout=layout, subjects=subjects))
    assert [(t.case, t.subject, t.name, t.modality) for t in found] == [
        ("p1_left", "p1", "cube", "mr"),
        ("p1_right", "p1", "cube", "mr"),
    ]


def test_subjects_of_single_volumes_are_refused(data):
    with pytest.raises(ValueError, match="has a case per subject; leave out"):
        read_click_set(data, subjects=Path("subjects.json"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scan_that_is_not_finite_is_no_failure_of_the_model(data, value):
    (case, *_) = read_click_set(data).cases
    image = Volume.load(case.case.images[0])
    image.array[0, 0, 0] = value
    image.save(case.case.images[0])
    with pytest.raises(DatasetError, match="non-finite"):
        next(read_click_set(data).targets(case))


@pytest.mark.parametrize(
    "change", [{"gts": 0.5}, {"gts": np.nan}, {"gts": "a"}, {"imgs": 1j}, {"imgs": "a"}], ids=str
)
def test_an_archive_of_other_numbers_is_refused(tmp_path, change):
    arrays = {"imgs": np.arange(60.0), "gts": np.ones(60)}
    arrays |= {name: np.full(60, value) for name, value in change.items()}
    arrays = {name: array.reshape(3, 4, 5) for name, array in arrays.items()}
    np.savez(tmp_path / "a.npz", spacing=np.ones(3), **arrays)
    with pytest.raises(DatasetError, match=r"a\.npz"):
        read_npz(tmp_path / "a.npz", spacing_is_xyz=True)


def test_volumes_of_one_name_are_refused(data):
    entries = json.loads((data / "labels.json").read_text())
    (data / "labels.json").write_text(json.dumps([*entries, entries[0]]))
    with pytest.raises(DatasetError, match="rename"):
        read_click_set(data)


def test_a_volume_that_is_missing_is_named_before_anything_is_played(data):
    found = read_click_set(data)
    found.cases[0].case.images[0].unlink()
    with pytest.raises(FileNotFoundError, match="check the path"):
        found.content_sha256()
