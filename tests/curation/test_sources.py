"""Raw folders in every layout give the same kind of cases."""

import json

import numpy as np
import pytest
from blocks import block

from sammed3d_backbone.curation.cases import open_grid, raw_targets
from sammed3d_backbone.curation.sources import read_raw
from sammed3d_backbone.data.datasets import DatasetError
from sammed3d_backbone.data.layouts import Layout


def targets(raw_set):
    return {
        raw.case.id: {
            target.name: int(target.mask.sum()) for target, _ in raw_targets(raw, open_grid(raw))
        }
        for raw in raw_set.cases
    }


TOY = {"head": 2 * 3 * 3, "tail": 2 * 3 * 3}


def test_a_decathlon_folder(decathlon):
    (raw_set,) = read_raw(decathlon(cases=2))
    assert (raw_set.name, raw_set.place, raw_set.channels) == ("Toy", ".", ("MRI",))
    assert targets(raw_set) == {"case_0": TOY, "case_1": TOY}


def test_an_nnunet_folder(nnunet):
    (raw_set,) = read_raw(nnunet())
    assert raw_set.cases[0].modality == "T1"
    assert targets(raw_set)["case_2"] == TOY


def test_a_bids_derivative(tmp_path, write_volume, labels):
    (tmp_path / "dataset_description.json").write_text('{"Name": "Bids"}')
    write_volume("sub-1/anat/sub-1_T1w.nii.gz")
    derivative = "derivatives/manual"
    write_volume(f"{derivative}/sub-1/anat/sub-1_dseg.nii.gz", labels * 5)
    (tmp_path / derivative / "dseg.tsv").write_text("index\tname\n5\thead\n10\ttail\n")
    (raw_set,) = read_raw(tmp_path)
    assert (raw_set.name, targets(raw_set)) == ("Bids", {"sub-1": TOY})
    for kind in ("desc-manual", "desc-auto"):
        write_volume(f"{derivative}/sub-1/anat/sub-1_{kind}_dseg.nii.gz", labels * 5)
    (tmp_path / derivative / "sub-1/anat/sub-1_dseg.nii.gz").unlink()
    with pytest.raises(DatasetError, match="desc-auto"):
        read_raw(tmp_path)
    (chosen,) = read_raw(tmp_path / derivative / "*_desc-manual_dseg.nii.gz")
    assert (chosen.place, chosen.folder, targets(chosen)) == (".", tmp_path, {"sub-1": TOY})


def test_a_layout_with_a_mask_per_class(tmp_path, write_volume, labels):
    write_volume("a/ct.nii.gz")
    write_volume("a/masks/head.nii.gz", (labels == 1).astype(np.uint8))
    write_volume("a/masks/tail.nii.gz", (labels == 2).astype(np.uint8))
    layout = Layout(
        name="Masks",
        channels=("CT",),
        classes=("head", "tail"),
        images=("{case}/ct.nii.gz",),
        label="{case}/masks/{class}.nii.gz",
    )
    (raw_set,) = read_raw(tmp_path, layout)
    assert targets(raw_set) == {"a": TOY}


def test_the_layout_of_the_reference(tmp_path, write_volume, labels):
    for name, value in (("head", 1), ("tail", 2)):
        for case in ("a", "b"):
            mask = (labels == value).astype(np.uint8)
            write_volume(f"{name}/mr_t1_Toys/imagesTr/{case}.nii.gz")
            write_volume(f"{name}/mr_t1_Toys/labelsTr/{case}.nii.gz", mask)
    (tmp_path / "tail/mr_t1_Toys/labelsTr/b.nii.gz").unlink()
    write_volume("head/ct_Dolls/imagesTr/c.nii.gz")
    write_volume("head/ct_Dolls/labelsTr/c.nii.gz", (labels > 0).astype(np.uint8))
    dolls, toys = read_raw(tmp_path)
    assert (dolls.name, dolls.place, dolls.channels) == ("ct_Dolls", "ct_Dolls", ("ct",))
    assert targets(toys) == {"a": TOY, "b": {"head": 18}}
    (tmp_path / "head/mr_t1_Toys/imagesTr/a.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"imagesTr/a\.nii\.gz is missing; copy it or remove a"):
        read_raw(tmp_path)


def test_a_folder_of_data_sets_is_searched(raw, tmp_path):
    raw({1: "liver"}, "deep/first", one=block())
    (tmp_path / "raw/.hidden").mkdir()
    folder = raw({4: "spleen"}, "second", two=block(4))
    first, second = read_raw(folder)
    assert [s.place for s in (first, second)] == ["deep/first", "second"]
    assert targets(second) == {"two": {"spleen": 512}}
    assert (second.channels, second.note) == (("CT",), "masks: manual")


def test_volumes_of_several_modalities_have_no_common_channel(raw, tmp_path):
    folder = raw({1: "liver"}, one=block(), two=block())
    entries = json.loads((folder / "set/labels.json").read_text())
    entries[0]["modality"] = "MR T1w"
    (folder / "set/labels.json").write_text(json.dumps(entries))
    (raw_set,) = read_raw(folder)
    assert raw_set.channels == ("image",)
    assert [case.modality for case in raw_set.cases] == ["MR T1w", "CT"]


def test_a_folder_without_data_sets_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="or describe it with --layout FILE"):
        read_raw(tmp_path)
    with pytest.raises(FileNotFoundError, match="check the path"):
        read_raw(tmp_path / "nowhere")
