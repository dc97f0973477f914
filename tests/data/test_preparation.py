"""Opened cases -> what the network sees; everything wrong with any of them at once."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from sammed3d_backbone.data.datasets import DatasetError
from sammed3d_backbone.data.folders import read_dataset
from sammed3d_backbone.data.preparation import load_image, prepare_cases
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.data.volume import Volume

PLAIN = Preprocessing(None, {"default": "zscore_positive"}, "volume", (1, 1, 1))


def prepared(folder, ids, preparation=PLAIN):
    return prepare_cases(read_dataset(folder), ids, preparation, progress=False)


def test_cases_come_in_the_order_asked_for(decathlon):
    cases = prepared(decathlon(), ["case_2", "case_0"])
    assert [case.case.id for case in cases] == ["case_2", "case_0"]
    assert cases[0].image.shape == cases[0].label.shape == (1, 6, 7, 8)


def test_image_and_label_stay_together_through_orientation_and_spacing():
    array = np.zeros((10, 12, 14), dtype=np.float32)
    array[2:5, 3:9, 4:8] = 100
    affine = np.array([[0, 0, -1.0, 0], [2.0, 0, 0, 0], [0, -1.5, 0, 0], [0, 0, 0, 1]])
    image = Volume(array + 1, affine)
    x, geometry = Preprocessing(
        (1.0, 1.0, 1.0), {"default": "zscore"}, "volume", (24, 24, 24)
    ).image(image)
    y = geometry.to_box(geometry.resample_labels((array > 0).astype(np.uint8)))
    assert x.shape[1:] == y.shape[1:]
    bright = x[0] > x.min() + 0.55 * (x.max() - x.min())  # a tie is background in labels
    agreement = 2 * (bright & (y[0] > 0)).sum() / (bright.sum() + (y > 0).sum())
    assert float(agreement) > 0.95


def test_small_volumes_are_padded_with_what_a_raw_zero_became():
    image = Volume(np.full((2, 2, 2), 4.0), np.eye(4))
    image.array[0] = 2
    x, geometry = Preprocessing(None, {"default": "zscore_positive"}, "volume", (4, 4, 4)).image(
        image
    )
    assert x.shape == (1, 4, 4, 4)
    assert float(x[0, 0, 0, 0]) == pytest.approx(-3 / image.array.std(ddof=1))
    assert geometry.box_start == (-1, -1, -1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_refused(value):
    image = Volume(np.ones((2, 4, 4, 4)), np.eye(4))
    image.array[1, 2, 2, 2] = value
    with pytest.raises(ValueError, match="1 non-finite"):
        PLAIN.image(image)


def test_channels_in_several_files_are_stacked(nnunet):
    (case, *_) = prepared(nnunet(), ["case_0"])
    assert case.image.shape == (2, 6, 7, 8)


def test_channels_on_different_grids_are_refused(nnunet, write_volume):
    folder = nnunet()
    write_volume("imagesTr/case_1_0001.nii.gz", affine=np.diag([1, 1, 2, 1]))
    with pytest.raises(DatasetError, match=r"case_1_0001.*away from .*case_1_0000"):
        prepared(folder, ["case_1"])
    with pytest.raises(ValueError, match="correct one affine"):
        load_image(read_dataset(folder).cases[1])


def test_everything_wrong_is_listed_at_once_with_its_path(decathlon, write_volume, labels):
    folder = decathlon(cases=5)
    (folder / "imagesTr/case_0.nii.gz").write_bytes(b"broken")
    write_volume("labelsTr/case_1.nii.gz", labels + 7)
    write_volume("imagesTr/case_2.nii.gz", shape=(6, 7, 9))
    write_volume("imagesTr/case_3.nii.gz", affine=np.diag([1, 1, 1.2, 1]))
    two = np.zeros((6, 7, 8, 2), np.float32)
    nib.save(nib.Nifti1Image(two, np.eye(4)), folder / "imagesTr/case_4.nii.gz")
    with pytest.raises(DatasetError, match="5 problems") as caught:
        prepared(folder, [f"case_{i}" for i in range(5)])
    for number, reason in enumerate(("broken", "values [7, 8, 9]", "shape", "away", "2 channels")):
        line = next(p for p in caught.value.problems if f"case_{number}" in p)
        assert reason in line or "cannot be read" in line
        assert str(folder) in line


def test_labels_stored_as_floats_are_taken_as_the_integers_they_are(
    decathlon, write_volume, labels
):
    folder = decathlon(cases=1)
    write_volume("labelsTr/case_0.nii.gz", labels.astype(np.float32))
    (case,) = prepared(folder, ["case_0"])
    assert case.label.dtype == torch.uint8
    assert np.array_equal(case.label[0].numpy(), labels)


@pytest.mark.parametrize("spacing", [(0.0, 1, 1), (1, -1, 1), (1, 1, np.nan), (1, np.inf, 1)])
def test_a_spacing_that_is_none_is_refused_early(spacing):
    with pytest.raises(ValueError, match="spacing_mm"):
        Preprocessing(spacing, {"default": "ct"}, "volume", (4, 4, 4))


def test_an_unknown_intensity_is_refused_early():
    with pytest.raises(ValueError, match="intensity"):
        Preprocessing(None, {"default": "minmax"}, "volume", (4, 4, 4))


@pytest.mark.parametrize("name", ["hippocampus", "headneck_ct"])
def test_real_cases_are_prepared(shared_data, name):
    dataset = read_dataset(shared_data / name)
    ids = [case.id for case in dataset.cases[:3]]
    intensity = "ct" if name == "headneck_ct" else "zscore_positive"
    cases = prepare_cases(
        dataset,
        ids,
        Preprocessing((3, 3, 3), {"default": intensity}, "volume", (32, 32, 32)),
        progress=False,
    )
    for case in cases:
        assert min(case.image.shape[1:]) >= 32
        assert bool(case.image.isfinite().all())
        assert set(case.label.unique().tolist()) <= set(dataset.labels)


def test_healthy_controls_are_used_and_said(decathlon, write_volume, labels, caplog):
    folder = decathlon()
    write_volume("labelsTr/case_1.nii.gz", np.zeros_like(labels))
    cases = prepared(folder, ["case_0", "case_1"])
    assert [bool(case.label.any()) for case in cases] == [True, False]
    assert cases[1].annotated.all()
    assert "case_1" in caplog.text


def test_a_class_that_was_looked_for_and_not_there_is_no_error(decathlon, write_volume, labels):
    folder = decathlon()
    write_volume("labelsTr/case_0.nii.gz", labels * (labels == 1))
    info = json.loads((folder / "dataset.json").read_text())
    info["training"][0]["annotated"] = ["head", "tail"]
    (folder / "dataset.json").write_text(json.dumps(info))
    (case,) = prepared(folder, ["case_0"])
    assert case.annotated.all()


def test_cases_without_any_structure_at_all_are_refused(decathlon, write_volume, labels):
    folder = decathlon(cases=2)
    for name in ("case_0", "case_1"):
        write_volume(f"labelsTr/{name}.nii.gz", np.zeros_like(labels))
    with pytest.raises(DatasetError, match="no case"):
        prepared(folder, ["case_0", "case_1"])


def test_a_cache_that_cannot_be_written_costs_a_warning(decathlon, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sammed3d_backbone.data.preparation.write_prepared", full)
    dataset = read_dataset(decathlon())
    (case,) = prepare_cases(dataset, ["case_0"], PLAIN, cache=tmp_path / "c", progress=False)
    assert case.image.shape == (1, 6, 7, 8)
    assert "space" in caplog.text
