"""dataset.json in the forms of the Decathlon and of nnU-Net."""

import json

import numpy as np
import pytest

from sammed3d_backbone.data.datasets import DatasetError, read_fold, require_whole_masks
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.preparation import load_label, open_case


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
        ({"labels": {"background": 0, "both": [0, 1]}}, "both"),
        ({"labels": {"background": 0, "all": [1, 3]}}, "number them 0, 1, 2"),
        ({"labels": {"background": 0, "ignore": 1, "a": 2}}, "ignore"),
        ({"labels": {"background": 0, "a": 1, "Ignore": 2}}, "Ignore"),
        ({"labels": {"background": 0, "a": [1, 2], "b": 2, "Ignore": 3}}, "Ignore"),
        ({"training": [{"image": [], "label": "labelsTr/case_0.nii.gz"}]}, "no image"),
        ({"modality": {"0": "M" * 5000}}, "shorten"),
        ({"labels": {"0": "background", "2": "b"}}, "number them 0, 1, 2"),
        ({"training": [{"image": "x.nii.gz"}]}, "add both paths"),
        ({"training": []}, "put them into imagesTr and labelsTr"),
        ({"modality": ["MRI"]}, "the channels are not numbered; give them as"),
        ({"modality": {"1": "MRI"}}, "the channels are not numbered"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "'a' and 'b'"),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "several values"),
        ({"labels": {"a": 0, "background": 1}}, "background"),
        ({"numTraining": 20}, "numTraining"),
    ],
)
def test_a_description_that_does_not_do_is_refused(decathlon, changes, remedy):
    with pytest.raises(DatasetError, match=remedy):
        read_dataset(decathlon(**changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("subject", subject) for subject in (None, "", True, ["anna"])),
        *(("fold", fold) for fold in (-1, "0", [0], float("nan"))),
    ],
)
def test_a_subject_or_fold_of_another_type_is_refused(decathlon, key, value):
    folder = decathlon(cases=2)
    info = json.loads((folder / "dataset.json").read_text())
    info["training"][0][key] = value
    (folder / "dataset.json").write_text(json.dumps(info))
    named = {"subject": "case_0 has the subject", "fold": '"fold"'}[key]
    with pytest.raises(DatasetError, match=named):
        read_dataset(folder)


def test_regions_and_what_is_to_be_ignored_are_read_as_nnunet_means_them(nnunet):
    labels = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumour": 2, "ignore": 4}
    folder = nnunet(labels=labels, regions_class_order=[1, 3, 2])
    dataset = read_dataset(folder)
    assert dataset.targets == {"kidney": (1, 2, 3), "masses": (2, 3), "tumour": (2,)}
    assert dict(dataset.labels) == {
        0: "background",
        1: "kidney, value 1",
        2: "tumour",
        3: "masses, value 3",
    }
    assert dataset.has_ignore


def test_ignored_voxels_stay_marked_and_other_values_are_refused(nnunet, labels, write_volume):
    dataset = read_dataset(nnunet(labels={"background": 0, "head": 1, "tail": 2, "ignore": 3}))
    write_volume("labelsTr/case_0.nii.gz", np.where(labels == 0, 3, labels))
    write_volume("labelsTr/case_1.nii.gz", np.where(labels == 0, 4, labels))
    problems, opened = open_case(dataset.cases[0], dataset)
    assert not problems
    assert set(np.unique(opened[1].array)) == {1, 2, 3}
    assert "[4]" in open_case(dataset.cases[1], dataset)[0][0]
    with pytest.raises(DatasetError, match="ignore"):
        require_whole_masks(dataset)


def test_a_channel_on_disk_that_is_not_named_is_refused(nnunet):
    with pytest.raises(DatasetError, match="channel_names"):
        read_dataset(nnunet(channel_names={"0": "T1"}))


def test_a_key_that_occurs_twice_is_refused(decathlon):
    folder = decathlon(cases=1)
    text = (folder / "dataset.json").read_text().rstrip().removesuffix("}")
    (folder / "dataset.json").write_text(text + ', "labels": {"background": 0}}')
    with pytest.raises(DatasetError, match="labels"):
        read_dataset(folder)


def test_files_in_another_format_are_to_be_converted(nnunet):
    with pytest.raises(DatasetError, match=r"convert them to \.nii\.gz"):
        read_dataset(nnunet(file_ending=".nrrd"))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_description_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text, encoding="latin-1")
    with pytest.raises(DatasetError, match="JSON"):
        read_dataset(tmp_path)


def test_nnunets_map_of_cases_may_point_anywhere(nnunet):
    folder = nnunet()
    (folder / "elsewhere").mkdir()
    (folder / "labelsTr/case_1.nii.gz").rename(folder / "elsewhere/mask.nii.gz")
    channels = [f"imagesTr/case_1_{channel:04d}.nii.gz" for channel in range(2)]
    mapped = {"one": {"images": channels, "label": "elsewhere/mask.nii.gz"}}
    (case,) = read_dataset(nnunet(dataset=mapped, numTraining=1)).cases
    assert (case.id, case.label) == ("one", folder / "elsewhere/mask.nii.gz")
    assert [path.name for path in case.images] == ["case_1_0000.nii.gz", "case_1_0001.nii.gz"]


def test_an_entry_of_nnunets_map_without_paths_is_refused(nnunet):
    with pytest.raises(DatasetError, match='one in "dataset" lacks "images" or "label"'):
        read_dataset(nnunet(dataset={"one": {"images": []}}))


def test_nnunets_map_may_name_a_mask_per_class(nnunet, write_volume, labels):
    images = [f"imagesTr/case_0_{channel:04d}.nii.gz" for channel in range(2)]
    write_volume("masks/tail.nii.gz", (labels == 2).astype(np.uint8))
    entry = {
        "images": images,
        "masks": {"tail": "masks/tail.nii.gz"},
        "annotated": ["tail"],
        "truncated": ["tail"],
        "subject": "somebody",
        "split": "val",
    }
    (case,) = read_dataset(nnunet(dataset={"one": entry}, numTraining=1)).cases
    assert (case.annotated, case.truncated) == (("tail",), ("tail",))
    assert (case.subject, case.split) == ("somebody", "val")
    assert np.array_equal(load_label(case).array, np.where(labels == 2, 2, 0))
    with pytest.raises(DatasetError, match=r"one: \['toe'\] are not classes"):
        read_dataset(nnunet(dataset={"one": {**entry, "masks": {"toe": "masks/tail.nii.gz"}}}))


def test_a_labelled_validation_list_is_the_published_split(decathlon):
    folder = decathlon()
    info = json.loads((folder / "dataset.json").read_text())
    info["validation"] = [info["training"].pop()]
    (folder / "dataset.json").write_text(json.dumps(info))
    assert [case.split for case in read_dataset(folder).cases] == ["train"] * 3 + ["val"]


def test_a_validation_list_without_labels_is_passed_over(decathlon):
    folder = decathlon(validation=["./imagesTs/case_9.nii.gz", {"image": "x.nii.gz"}])
    assert {case.split for case in read_dataset(folder).cases} == {""}


def test_an_image_that_nobody_labelled_is_missed(nnunet):
    folder = nnunet()
    (folder / "labelsTr/case_2.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"labelsTr/case_2\.nii\.gz is missing; copy it"):
        read_dataset(folder)


def test_monai_lists_name_a_file_per_channel_and_a_fold(decathlon, write_volume):
    folder = decathlon()
    for i in range(4):
        write_volume(f"P{i}/flair.nii.gz", seed=9 + i)
    info = json.loads((folder / "dataset.json").read_text())
    for i, entry in enumerate(info["training"]):
        entry |= {"image": [entry["image"], f"P{i}/flair.nii.gz"], "fold": i % 2}
    (folder / "dataset.json").write_text(json.dumps(info | {"modality": {"0": "T1", "1": "FLAIR"}}))
    dataset = read_dataset(folder)
    assert [case.id for case in dataset.cases] == [f"case_{i}" for i in range(4)]
    assert [len(case.images) for case in dataset.cases] == [2] * 4
    assert read_fold(dataset, 1).val == ("case_1", "case_3")
    assert read_fold(dataset, 1).train == ("case_0", "case_2")
    with pytest.raises(ValueError, match="fold"):
        read_fold(dataset, 2)


def test_a_listed_fold_with_a_subject_on_both_sides_is_refused(decathlon):
    folder = decathlon()
    info = json.loads((folder / "dataset.json").read_text())
    for i, entry in enumerate(info["training"]):
        entry |= {"fold": i % 2, "subject": "anna"}
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(DatasetError, match="anna"):
        read_fold(read_dataset(folder), 0)


def test_a_name_in_the_place_of_a_list_of_images_is_refused(nnunet):
    entry = {"images": "imagesTr/case_0_0000.nii.gz", "label": "labelsTr/case_0.nii.gz"}
    with pytest.raises(DatasetError, match='case_0 in "dataset"'):
        read_dataset(nnunet(dataset={"case_0": entry}))
