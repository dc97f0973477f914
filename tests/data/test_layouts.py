"""Folders that a layout describes."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from sammed3d_backbone.data.datasets import DatasetError, read_fold
from sammed3d_backbone.data.folders import find_dataset, read_dataset
from sammed3d_backbone.data.layouts import Layout, read_layout
from sammed3d_backbone.data.preparation import load_label, prepare_cases
from sammed3d_backbone.data.preprocessing import Preprocessing

FLAT = Layout(
    name="Flat",
    channels=("CT",),
    classes=("head", "tail"),
    images=("img/img{case}.nii.gz",),
    label="label/label{case}.nii.gz",
    note="a toy",
    citation="nobody",
    licence="none",
)
MASKS = replace(
    FLAT,
    channels=("T1", "T2"),
    images=("{case}/{case}-t1.nii.gz", "{case}/{case}-t2.nii.gz"),
    label="{case}/masks/{class}.nii.gz",
)
SPLIT = replace(
    FLAT,
    images=("images{split}/{case}.nii.gz",),
    label="labels{split}/{case}.nii.gz",
    splits=("Tr", "Va"),
)


@pytest.fixture
def flat(tmp_path, write_volume, labels):
    """Three cases of FLAT."""
    for i in range(3):
        write_volume(f"img/img{i:04d}.nii.gz", seed=i)
        write_volume(f"label/label{i:04d}.nii.gz", labels)
    return tmp_path


@pytest.fixture
def masks(tmp_path, write_volume, labels):
    """Two cases of MASKS; the tail's mask covers the head's."""
    for name in ("a_1", "a_2"):
        for channel in ("t1", "t2"):
            write_volume(f"{name}/{name}-{channel}.nii.gz")
        write_volume(f"{name}/masks/head.nii.gz", (labels > 0).astype(np.uint8))
        write_volume(f"{name}/masks/tail.nii.gz", (labels == 2).astype(np.uint8))
    return tmp_path


def prepared(folder, layout):
    dataset = read_dataset(folder, layout)
    plain = Preprocessing(None, {"default": "zscore_positive"}, "volume", (1, 1, 1))
    return prepare_cases(dataset, [c.id for c in dataset.cases], plain, progress=False)


def test_a_folder_is_read_as_described(flat):
    dataset = read_dataset(flat, FLAT)
    assert [case.id for case in dataset.cases] == ["0000", "0001", "0002"]
    assert dataset.labels == {0: "background", 1: "head", 2: "tail"}
    assert (dataset.name, dataset.note) == ("Flat", "a toy")
    assert dataset.about == {"reference": "nobody", "licence": "none"}
    assert dataset.cases[1].images == (flat / "img/img0001.nii.gz",)
    assert find_dataset(str(flat), FLAT) == flat


def test_a_mask_per_class_becomes_one_label_and_the_later_class_wins(masks, labels):
    (first, _) = prepared(masks, MASKS)
    assert first.image.shape[0] == 2
    assert np.array_equal(first.label[0].numpy(), labels)


def test_values_with_gaps_become_class_numbers(flat, write_volume, labels):
    for i in range(3):
        write_volume(f"label/label{i:04d}.nii.gz", np.array([0, 4, 1], np.uint8)[labels])
    layout = replace(FLAT, values=(4, 1))
    assert np.array_equal(load_label(read_dataset(flat, layout).cases[0]).array, labels)
    with pytest.raises(DatasetError, match=r"values \[4\] are not declared \(\[0, 1, 2\]\)"):
        prepared(flat, FLAT)


def test_a_mask_of_other_values_is_refused(masks, write_volume, labels):
    write_volume("a_2/masks/tail.nii.gz", labels)
    with pytest.raises(DatasetError, match=r"tail\.nii\.gz: values \[2\] are not declared"):
        prepared(masks, MASKS)


def test_a_mask_on_another_grid_is_refused(masks, write_volume, labels):
    write_volume("a_2/masks/tail.nii.gz", labels[:-1])
    with pytest.raises(DatasetError, match=r"tail\.nii\.gz: shape .*a_2-t1\.nii\.gz has"):
        prepared(masks, MASKS)


@pytest.mark.parametrize("gone", ["img/img0001.nii.gz", "label/label0001.nii.gz"])
def test_an_image_without_a_label_is_missed_and_the_other_way_round(flat, gone):
    (flat / gone).unlink()
    with pytest.raises(DatasetError, match=f"{gone} is missing; copy it or remove 0001"):
        read_dataset(flat, FLAT)


def test_ids_that_do_not_match_are_passed_over(flat):
    layout = replace(FLAT, cases="000[02]")
    assert [case.id for case in read_dataset(flat, layout).cases] == ["0000", "0002"]


def test_the_subject_is_a_part_of_the_id(masks):
    layout = replace(MASKS, subject=r"(a)_\d")
    assert {case.subject for case in read_dataset(masks, layout).cases} == {"a"}
    with pytest.raises(DatasetError, match="a_1 does not match subject"):
        read_dataset(masks, replace(MASKS, subject="(b)"))


def test_folders_of_a_published_split_make_its_fold(tmp_path, write_volume, labels):
    for name, part in (("a", "Tr"), ("b", "Tr"), ("c", "Va"), ("d", "Ts")):
        write_volume(f"images{part}/{name}.nii.gz")
        write_volume(f"labels{part}/{name}.nii.gz", labels)
    fold = read_fold(read_dataset(tmp_path, SPLIT), 0)
    assert (fold.train, fold.val) == (("a", "b"), ("c",))


@pytest.mark.parametrize("delimiter", [";", ","])
def test_a_table_of_the_published_split_makes_its_fold(flat, delimiter):
    with (flat / "meta.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows(
            [
                ["image_id", "age", "split"],
                *zip(("0000", "0001", "0002"), "123", ("val", "train", "test"), strict=True),
            ]
        )
    fold = read_fold(read_dataset(flat, replace(FLAT, split_table="meta.csv")), 0)
    assert (fold.train, fold.val) == (("0001",), ("0000",))


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (None, "is missing; copy it, or remove split_table"),
        ("id;part\n0000;val\n", "lacks the columns image_id and split; copy it again"),
        ("image_id;split\n0000;val\n", r"0001 is not in meta\.csv; add it or remove the case"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(flat, content, remedy):
    if content is not None:
        (flat / "meta.csv").write_text(content)
    with pytest.raises(DatasetError, match=remedy):
        read_dataset(flat, replace(FLAT, split_table="meta.csv"))


def test_an_asterisk_stands_for_anything_but_for_one_file(flat):
    layout = replace(FLAT, images=("*/img{case}.nii.gz",))
    assert read_dataset(flat, layout).cases[0].images == (flat / "img/img0000.nii.gz",)
    (flat / "old").mkdir()
    (flat / "old/img0001.nii.gz").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"0001: .* all fit .*; keep one"):
        read_dataset(flat, layout)


def test_a_folder_with_nothing_of_the_layout_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="pass the folder that these start from"):
        read_dataset(tmp_path, FLAT)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder in .*nowhere; pass data=FOLDER"):
        find_dataset(str(tmp_path / "nowhere"), FLAT)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"images": ("a.nii.gz",)}, "{case}"),
        ({"channels": ("a", "b", "c"), "images": ("{case}1", "{case}2")}, "give one for each"),
        ({"values": (1,)}, "give 2 different ones"),
        ({"values": (1, 0)}, "none of them 0"),
        ({"splits": ("Tr", "Va")}, "or neither"),
        ({"label": "labels{split}/{case}.nii.gz"}, "give what {split} stands for"),
        ({"cases": "("}, "regular expression"),
        ({"subject": ".+"}, r"has no group"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_do_is_refused(changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        replace(FLAT, **changes)


def test_a_layout_is_a_flat_yaml_file(tmp_path):
    path = tmp_path / "layout.yaml"
    path.write_text(
        "name: Flat\nchannels: [CT]\nclasses: [head, tail]\nimages: ['img/img{case}.nii.gz']\n"
        "label: label/label{case}.nii.gz\nnote: a toy\ncitation: nobody\nlicence: none\n"
    )
    assert read_layout(path) == FLAT
    path.write_text("name: Flat\nclases: [head]\n")
    with pytest.raises(
        ValueError, match=r"layout\.yaml: unknown key 'clases'; did you mean 'classes'"
    ):
        read_layout(path)
    with pytest.raises(FileNotFoundError, match=r"pass one of recipes/layouts/\*\.yaml"):
        read_layout(tmp_path / "none.yaml")


@pytest.mark.parametrize("pattern", ["img/*{case}.nii.gz", "img/i*{case}*.gz"])
def test_an_asterisk_may_stand_beside_the_case(flat, pattern):
    layout = replace(FLAT, images=(pattern,), cases=r"000\d")
    first = read_dataset(flat, layout).cases[0]
    assert (first.id, first.images) == ("0000", (flat / "img/img0000.nii.gz",))


def test_a_pattern_outside_of_the_folder_is_refused():
    with pytest.raises(ValueError, match="relative"):
        replace(FLAT, images=("/img/img{case}.nii.gz",))
