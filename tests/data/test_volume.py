"""NIfTI file <-> array and affine."""

import gzip
import os
import signal
import subprocess
import sys
import textwrap

import nibabel as nib
import numpy as np
import pytest

from sammed3d_backbone.data.volume import Volume

OBLIQUE = np.array([[0, -1.5, 0.1, 4], [0.7, 0, 0.2, -3], [0.1, 0.1, 3, 9], [0, 0, 0, 1]])


def test_what_is_saved_is_loaded_back(tmp_path, rng):
    array = rng.normal(size=(3, 4, 5)).astype(np.float32)
    Volume(array, OBLIQUE).save(tmp_path / "v.nii.gz")
    back = Volume.load(tmp_path / "v.nii.gz")
    assert np.array_equal(back.array, array)
    assert np.allclose(back.affine, OBLIQUE, atol=1e-6)


@pytest.mark.parametrize("form", ["sform", "qform"])
def test_the_affine_of_a_file_goes_through_bit_equal(tmp_path, form):
    header = nib.Nifti1Header()
    rotation = np.diag([0.7, 0.9, 1.1, 1.0]) @ np.eye(4)
    if form == "sform":
        header.set_sform(OBLIQUE, code=1)
    else:
        header.set_qform(rotation, code=1)
        header.set_sform(None, code=0)
    affine = OBLIQUE if form == "sform" else rotation
    image = nib.Nifti1Image(np.zeros((2, 3, 4), np.int16), None, header)
    nib.save(image, tmp_path / "in.nii")
    volume = Volume.load(tmp_path / "in.nii")
    Volume(np.ones((2, 3, 4), np.uint8), volume.affine, volume.header).save(tmp_path / "out.nii.gz")
    assert np.array_equal(Volume.load(tmp_path / "out.nii.gz").affine, volume.affine)
    assert np.allclose(volume.affine, affine, atol=1e-6)


def test_a_label_written_with_the_header_of_a_scaled_image_keeps_its_values(tmp_path):
    image = nib.Nifti1Image(np.arange(8, dtype=np.float32).reshape(2, 2, 2) * 1000, np.eye(4))
    image.header.set_data_dtype(np.int16)
    image.header["cal_max"] = 100
    nib.save(image, tmp_path / "image.nii.gz")
    header = Volume.load(tmp_path / "image.nii.gz").header
    labels = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    Volume(labels, np.eye(4), header).save(tmp_path / "label.nii.gz")
    back = nib.load(tmp_path / "label.nii.gz")
    assert np.array_equal(np.asarray(back.dataobj), labels)
    assert back.get_data_dtype() == np.uint8


def test_channels_come_first_in_memory_and_last_in_the_file(tmp_path, rng):
    array = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    Volume(array, np.eye(4)).save(tmp_path / "v.nii.gz")
    assert nib.load(tmp_path / "v.nii.gz").shape == (3, 4, 5, 2)
    back = Volume.load(tmp_path / "v.nii.gz")
    assert (back.channels, back.shape) == (2, (3, 4, 5))
    assert np.array_equal(back.array, array)


def test_a_label_of_a_scan_with_channels_is_a_plain_volume(tmp_path):
    Volume(np.ones((2, 3, 4, 5), np.float32), OBLIQUE).save(tmp_path / "scan.nii.gz")
    scan = Volume.load(tmp_path / "scan.nii.gz")
    Volume(np.ones((3, 4, 5), np.uint8), scan.affine, scan.header).save(tmp_path / "label.nii.gz")
    label = nib.load(tmp_path / "label.nii.gz")
    assert label.shape == (3, 4, 5)
    assert np.array_equal(label.affine, scan.affine)


def test_the_second_version_of_the_format_is_kept(tmp_path, caplog):
    nib.save(nib.Nifti2Image(np.ones((3, 4, 5), np.float32), OBLIQUE), tmp_path / "in.nii.gz")
    Volume.load(tmp_path / "in.nii.gz").save(tmp_path / "out.nii.gz")
    assert isinstance(nib.load(tmp_path / "out.nii.gz"), nib.Nifti2Image)
    assert not caplog.records


def test_a_file_with_a_long_extension_is_read(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"label table " * 1000))
    nib.save(image, tmp_path / "labels.nii.gz")
    assert np.array_equal(Volume.load(tmp_path / "labels.nii.gz").array, image.get_fdata())


def test_a_fourth_axis_of_one_is_no_channel(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5, 1), np.int16), np.eye(4)), tmp_path / "v.nii")
    assert Volume.load(tmp_path / "v.nii").array.shape == (3, 4, 5)


def test_the_spacing_is_read_from_the_affine():
    volume = Volume(np.zeros((2, 2, 2)), np.diag([-0.7, 1.5, 3, 1]))
    assert volume.spacing_mm == pytest.approx((0.7, 1.5, 3))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.nii\.gz; check the path"):
        Volume.load(tmp_path / "none.nii.gz")


def broken_files(good):
    """What becomes of files on their way."""
    return {
        "empty": b"",
        "text": b"not an image at all " * 40,
        "cut": good[: len(good) // 2],
        "flipped": good[:400] + bytes(255 - b for b in good[400:440]) + good[440:],
        "cut inside": gzip.compress(gzip.decompress(good)[:500]),
    }


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "cut inside"])
def test_a_broken_file_is_refused_with_its_path(tmp_path, damage, rng):
    Volume(rng.normal(size=(9, 9, 9)), np.eye(4)).save(tmp_path / "good.nii.gz")
    path = tmp_path / "broken.nii.gz"
    path.write_bytes(broken_files((tmp_path / "good.nii.gz").read_bytes())[damage])
    with pytest.raises(ValueError, match=r"broken\.nii\.gz .*copy or convert it again"):
        Volume.load(path)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        ([("R", "u1"), ("G", "u1"), ("B", "u1")], r"rgb\.nii.* type .*'R'.*one number per voxel"),
        (np.complex64, r"rgb\.nii.* type complex64; save their magnitude"),
        (np.complex128, "type complex128; save their magnitude"),
    ],
)
def test_voxels_of_several_numbers_are_refused_by_their_type(tmp_path, dtype, remedy):
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), dtype), np.eye(4)), tmp_path / "rgb.nii")
    with pytest.raises(ValueError, match=remedy):
        Volume.load(tmp_path / "rgb.nii")


@pytest.mark.parametrize(
    ("affine", "remedy"),
    [
        (np.diag([1.0, 1.0, 0.0, 1.0]), "singular"),
        (np.full((4, 4), np.nan), "not a finite 4 x 4"),
        (np.eye(3), "not a finite 4 x 4"),
    ],
)
def test_an_affine_that_places_nothing_is_refused(affine, remedy):
    with pytest.raises(ValueError, match=remedy):
        Volume(np.zeros((2, 2, 2)), affine)


def test_a_file_without_a_usable_affine_is_refused_with_its_path(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), None)
    image.header.set_sform(np.diag([1.0, 1.0, 0.0, 1.0]), code=1)
    nib.save(image, tmp_path / "flat.nii")
    with pytest.raises(ValueError, match=r"flat\.nii"):
        Volume.load(tmp_path / "flat.nii")


@pytest.mark.parametrize("shape", [(2, 2), (1, 1, 2, 2, 2), (0, 2, 2)])
def test_an_array_that_is_no_volume_is_refused(shape):
    with pytest.raises(ValueError, match="give "):
        Volume(np.zeros(shape), np.eye(4))


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "v.nii.gz"
    Volume(np.zeros((2, 2, 2)), np.eye(4)).save(path)
    before = path.read_bytes()

    def fail(image, filename):
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        Volume(np.ones((2, 2, 2)), np.eye(4)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "v.nii.gz"
    Volume(np.zeros((2, 2, 2)), np.eye(4)).save(path)
    before = path.read_bytes()
    code = f"""
        import os, signal
        import nibabel as nib, numpy as np
        from sammed3d_backbone.data.volume import Volume
        def die(image, filename):
            filename.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        nib.save = die
        Volume(np.ones((2, 2, 2)), np.eye(4)).save({str(path)!r})
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ, check=False)
    assert run.returncode == -signal.SIGKILL
    assert path.read_bytes() == before


def written(path, array, **fields):
    """A NIfTI file with fields of the header set as no library would."""
    image = nib.Nifti1Image(array, OBLIQUE)
    image.set_qform(np.diag([0.7, 0.9, 1.1, 1.0]), 1)
    image.set_sform(OBLIQUE, fields.pop("sform_code", 1))
    content, header = bytearray(image.to_bytes()), image.header
    header["vox_offset"] = 352
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("b", [0.6, 0.60002])
def test_a_quaternion_too_long_by_rounding_is_shortened(tmp_path, b):
    fields = {"quatern_b": b, "quatern_c": 0.8, "quatern_d": 0.001, "sform_code": 0}
    found = Volume.load(written(tmp_path / "a.nii", np.ones((2, 3, 4)), **fields))
    assert np.allclose(found.spacing_mm, (0.7, 0.9, 1.1), atol=1e-3)
    assert found.header.get_qform(coded=True)[1] == 1


def test_an_impossible_quaternion_beside_an_sform_is_not_used(tmp_path):
    fields = {"quatern_b": 3.0, "quatern_c": 0.8}
    found = Volume.load(written(tmp_path / "a.nii", np.ones((2, 3, 4)), **fields))
    assert np.allclose(found.affine, OBLIQUE, atol=1e-6)
    found.save(tmp_path / "b.nii")
    with pytest.raises(ValueError, match=r"a\.nii"):
        Volume.load(written(tmp_path / "a.nii", np.ones((2, 3, 4)), **fields, sform_code=0))


def test_units_without_a_meaning_are_millimetres(tmp_path):
    image = nib.Nifti1Image(np.ones((3, 3, 3), np.int16), np.diag([2, 2, 3, 1]))
    image.header["xyzt_units"] = 255
    nib.save(image, tmp_path / "v.nii")
    assert Volume.load(tmp_path / "v.nii").spacing_mm == (2, 2, 3)


def test_a_pixdim_of_zero_is_refused_where_the_spacing_depends_on_it(tmp_path):
    image = nib.Nifti1Image(np.ones((3, 3, 3), np.int16), np.diag([2, 2, 3, 1]))
    content = bytearray(image.to_bytes())
    content[76 + 3 * 4 : 76 + 4 * 4] = bytes(4)  # pixdim[3]
    (tmp_path / "v.nii").write_bytes(content)
    assert Volume.load(tmp_path / "v.nii").spacing_mm == (2, 2, 3)  # of the sform
    content[252:256] = bytes(4)  # qform_code and sform_code
    (tmp_path / "v.nii").write_bytes(content)
    with pytest.raises(ValueError, match=r"v\.nii has a pixdim"):
        Volume.load(tmp_path / "v.nii")


def test_capitals_in_the_ending_change_nothing(tmp_path):
    image = nib.Nifti1Image(np.ones((3, 4, 5), np.int16), np.diag([2, 2, 3, 1]))
    sheared = np.array([[2, 0.5, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    image.set_sform(sheared, 2)
    nib.save(image, tmp_path / "v.nii.gz")
    (tmp_path / "v.nii.gz").rename(tmp_path / "V.NII.GZ")
    assert np.allclose(Volume.load(tmp_path / "V.NII.GZ").affine, sheared)


def test_the_channels_of_itk_are_channels(tmp_path, rng):
    array = rng.normal(size=(3, 4, 5, 1, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, OBLIQUE), tmp_path / "v.nii")
    assert np.array_equal(
        Volume.load(tmp_path / "v.nii").array, np.moveaxis(array[:, :, :, 0], -1, 0)
    )


def test_what_a_header_says_in_words_does_not_travel(tmp_path):
    image = nib.Nifti1Image(np.ones((2, 3, 4), np.int16), OBLIQUE)
    image.header["descrip"] = b"Anna Muster"
    image.header["aux_file"] = b"Anna"
    image.header["intent_name"] = b"Anna"
    image.header["db_name"] = b"Anna"
    image.header.set_intent("z score", name="Anna")
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Anna Muster"))
    nib.save(image, tmp_path / "in.nii")
    Volume.load(tmp_path / "in.nii").save(tmp_path / "out.nii")
    assert b"Anna" not in (tmp_path / "out.nii").read_bytes()
    assert nib.load(tmp_path / "out.nii").header.get_intent()[0] == "none"
    before, after = (nib.load(tmp_path / name).header for name in ("in.nii", "out.nii"))
    assert before["sform_code"] == after["sform_code"]


def test_a_volume_may_be_kept_from_replacing_a_file(tmp_path):
    (tmp_path / "a.nii").write_text("precious")
    with pytest.raises(FileExistsError):
        Volume(np.ones((2, 3, 4)), OBLIQUE).save(tmp_path / "a.nii", overwrite=False)
    assert (tmp_path / "a.nii").read_text() == "precious"


def test_permissions_of_a_volume_follow_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        Volume(np.ones((2, 3, 4)), OBLIQUE).save(tmp_path / "a.nii.gz")
    finally:
        os.umask(before)
    assert (tmp_path / "a.nii.gz").stat().st_mode & 0o777 == 0o600
