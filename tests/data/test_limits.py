"""Headers are held against the limits of a scan before memory is asked for."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from sammed3d_backbone.data.geometry import Geometry
from sammed3d_backbone.data.nifti import SPARE_BYTES
from sammed3d_backbone.data.preprocessing import Preprocessing
from sammed3d_backbone.data.volume import Volume

ARRAY = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)


def preprocessing(mm):
    return Preprocessing((mm,) * 3, {"default": "zscore"}, "volume", (8, 8, 8))


@pytest.mark.parametrize("mm", [0.001, 1000.0])
def test_no_volume_and_no_card_has_an_implausible_spacing(tmp_path, mm):
    nib.save(nib.Nifti1Image(ARRAY, np.diag([mm, mm, mm, 1])), tmp_path / "in.nii")
    with pytest.raises(ValueError, match=r"in\.nii.*spacing"):
        Volume.load(tmp_path / "in.nii")
    with pytest.raises(ValueError, match="spacing"):
        preprocessing(mm)


@pytest.mark.parametrize(("unit", "mm"), [("meter", 0.0015), ("micron", 1500.0), ("mm", 1.5)])
def test_the_unit_of_the_header_is_honoured(tmp_path, unit, mm):
    image = nib.Nifti1Image(ARRAY, np.diag([mm, mm, mm, 1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "in.nii")
    volume = Volume.load(tmp_path / "in.nii")
    assert volume.spacing_mm == pytest.approx((1.5, 1.5, 1.5))
    volume.save(tmp_path / "out.nii")
    assert nib.load(tmp_path / "out.nii").header.get_xyzt_units()[0] == "mm"
    assert Volume.load(tmp_path / "out.nii").spacing_mm == pytest.approx((1.5, 1.5, 1.5))


def test_a_unit_that_makes_the_spacing_implausible_is_named(tmp_path):
    image = nib.Nifti1Image(ARRAY, np.eye(4))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "in.nii")
    with pytest.raises(ValueError, match="meter"):
        Volume.load(tmp_path / "in.nii")


@pytest.mark.parametrize(("native", "wanted"), [(99.0, 1.0), (1.0, 0.01)])
def test_a_grid_that_does_not_fit_in_memory_is_refused(native, wanted):
    with pytest.raises(ValueError, match="GiB"):
        Geometry.plan((22, 18, 17), np.diag([native, native, native, 1]), (wanted,) * 3)
    with pytest.raises(ValueError, match="GiB"):
        Geometry.plan((22, 18, 17), np.eye(4), min_shape=(10**5,) * 3)


@pytest.mark.parametrize(
    ("array", "token"),
    [
        (np.full_like(ARRAY, 7), "7"),
        (ARRAY * np.nan, "NaN"),
        (ARRAY.astype(float) * 1e300, "float32"),
    ],
    ids=["constant", "nan", "beyond float32"],
)
def test_a_volume_without_an_image_is_refused(array, token):
    with pytest.raises(ValueError, match=token):
        preprocessing(1.0).image(Volume(array, np.eye(4)))


def test_gzip_is_unpacked_as_far_as_the_header_says(tmp_path):
    content = nib.Nifti1Image(ARRAY, np.eye(4)).to_bytes()
    path = tmp_path / "bomb.nii.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(content + bytes(4 * SPARE_BYTES))
    with pytest.raises(ValueError, match=r"bomb\.nii\.gz"):
        Volume.load(path)
    path.write_bytes(gzip.compress(content + bytes(10)))
    assert np.array_equal(Volume.load(path).array, ARRAY)


@pytest.mark.parametrize(
    ("kind", "place", "n_bytes"), [(nib.Nifti1Image, 108, 4), (nib.Nifti2Image, 168, 8)]
)
def test_vox_offset_0_means_behind_the_header(tmp_path, kind, place, n_bytes):
    content = bytearray(kind(ARRAY, np.eye(4)).to_bytes())
    content[place : place + n_bytes] = bytes(n_bytes)
    (tmp_path / "in.nii").write_bytes(content)
    assert np.array_equal(Volume.load(tmp_path / "in.nii").array, ARRAY)


@pytest.mark.parametrize("offset", [np.inf, 1e38, 100.0])
def test_an_impossible_vox_offset_is_refused(tmp_path, offset):
    content = bytearray(nib.Nifti1Image(ARRAY, np.eye(4)).to_bytes())
    content[108:112] = np.float32(offset).tobytes()
    (tmp_path / "in.nii").write_bytes(content)
    with pytest.raises(ValueError, match=r"in\.nii"):
        Volume.load(tmp_path / "in.nii")
