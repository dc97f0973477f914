"""A DICOM series is read as it lies in space, or refused with the slice that is wrong."""

import shutil
import warnings

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
pytest.importorskip("highdicom", reason="needs the extra dicom")

from dicom_series import (  # noqa: E402 (needs pydicom)
    AXIAL,
    CORONAL,
    ORIGIN_MM,
    PATIENT,
    STEP_MM,
    as_jpeg_lossless,
    pixels,
    write_enhanced,
    write_series,
)

from sammed3d_backbone.data.volume import Volume  # noqa: E402

OBLIQUE = (0.8, 0.6, 0.0, -0.36, 0.48, 0.8)
JITTER_MM = np.random.default_rng(0).uniform(-0.05, 0.05, (8, 1)) * [0, 0, 1]
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's left and posterior to right and anterior


def expected_affine(orientation):
    axes = np.reshape(orientation, (2, 3))
    affine = np.eye(4)
    affine[:3] = np.stack(
        [0.5 * axes[0], 0.75 * axes[1], STEP_MM * np.cross(*axes), ORIGIN_MM], axis=1
    )
    return FLIP @ affine


def expected_array(slices):
    """(columns, rows, slices), rescaled."""
    return np.stack([2.0 * pixels(k).T - 1024 for k in range(slices)], axis=-1)


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, OBLIQUE])
def test_slices_are_sorted_and_placed(tmp_path, orientation):
    write_series(tmp_path, orientation=orientation)
    volume = Volume.load(tmp_path)
    assert np.allclose(volume.affine, expected_affine(orientation), rtol=0, atol=1e-6)
    assert np.array_equal(volume.array, expected_array(8))


def test_a_file_stands_for_its_series(tmp_path):
    write_series(tmp_path)
    write_series(tmp_path / "deeper")
    (tmp_path / "notes.txt").write_text("not DICOM")
    assert Volume.load(tmp_path / "IM0002").shape == (5, 6, 8)


def test_copies_of_files_and_other_files_do_not_matter(tmp_path):
    write_series(tmp_path)
    shutil.copy(tmp_path / "IM0003", tmp_path / "copy.dcm")
    (tmp_path / "README").write_text("a page " * 100)

    def report(image, number):
        del image.ImagePositionPatient

    write_series(tmp_path / "report", slices=1, change=report)
    assert np.array_equal(Volume.load(tmp_path).array, expected_array(8))


def tilted(image, number):
    x, y, z = image.ImagePositionPatient
    image.ImagePositionPatient = [x, y + number * STEP_MM * np.tan(np.radians(11)), z]


def colour(image, number):
    image.SamplesPerPixel, image.PhotometricInterpretation = 3, "RGB"
    image.PlanarConfiguration, image.BitsAllocated, image.BitsStored, image.HighBit = 0, 8, 8, 7


def missing_pixels(image, number):
    if number == 4:
        del image.PixelData


def same_place(image, number):
    image.ImagePositionPatient = [*image.ImagePositionPatient[:2], float(number // 2)]


@pytest.mark.parametrize(
    ("fault", "tokens"),
    [
        ({"skip": (3,)}, ["a slice is missing", "IM00", "5.000"]),
        ({"skip": (2, 3, 5)}, ["2 slices are missing", "IM00", "other place"]),
        ({"change": tilted}, ["tilted by 11.0 degrees", "IM00"]),
        ({"offsets_mm": JITTER_MM}, ["irregular", "IM00", "--slice-tolerance"]),
        ({"change": colour}, ["RGB", "IM00"]),
        ({"change": missing_pixels}, ["IM00", "decoded"]),
        ({"change": same_place}, ["same plane", "IM00"]),
        ({"slices": 0}, ["no DICOM image"]),
    ],
)
def test_a_faulty_series_is_refused_with_the_slice(tmp_path, fault, tokens):
    write_series(tmp_path, **fault)
    with pytest.raises(ValueError, match=tokens[0]) as caught:
        Volume.load(tmp_path)
    message = str(caught.value)
    assert all(token in message for token in [str(tmp_path), *tokens]), message
    assert PATIENT not in message
    assert "\n" not in message


def test_a_small_tilt_is_refused_too(tmp_path):
    drift = np.arange(8)[:, None] * STEP_MM * np.tan(np.radians(2)) * np.array([0, 1, 0])
    write_series(tmp_path, offsets_mm=drift)
    with pytest.raises(ValueError, match=r"tilted by 2\.0"):
        Volume.load(tmp_path)


def test_irregular_slices_are_read_on_request(tmp_path):
    write_series(tmp_path, offsets_mm=JITTER_MM)
    volume = Volume.load(tmp_path, slice_tolerance_mm=0.15)
    assert np.array_equal(volume.array, expected_array(8))
    places = FLIP @ volume.affine @ [[0] * 8, [0] * 8, range(8), [1] * 8]
    true = ORIGIN_MM[2] + STEP_MM * np.arange(8) + JITTER_MM[:, 2]
    assert np.abs(places[2] - true).max() < 0.15


def test_no_tolerance_hides_a_missing_slice(tmp_path):
    write_series(tmp_path, skip=(3,))
    with pytest.raises(ValueError, match="missing"):
        Volume.load(tmp_path, slice_tolerance_mm=10)


def test_nothing_is_said_about_odd_tags_which_may_be_names(tmp_path, caplog, capfd):
    def odd(image, number):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.PatientAge = PATIENT

    write_series(tmp_path, change=odd)
    caplog.clear()
    Volume.load(tmp_path)
    assert not caplog.records
    assert PATIENT not in "".join(capfd.readouterr())


def test_one_of_two_series_is_chosen_by_its_uid(tmp_path):
    first = write_series(tmp_path / "a")
    second = write_series(tmp_path / "b", slices=3)
    with pytest.raises(ValueError, match="--series") as caught:
        Volume.load(tmp_path)
    assert first in str(caught.value)
    assert second in str(caught.value)
    assert Volume.load(tmp_path, series=second).shape == (5, 6, 3)
    with pytest.raises(ValueError, match=r"no series 1\.2"):
        Volume.load(tmp_path, series="1.2")


def test_a_scout_in_the_series_is_a_stack_of_its_own(tmp_path):
    def scout(image, number):
        image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    series = write_series(tmp_path)
    write_series(tmp_path / "s", slices=1, orientation=CORONAL, series=series, change=scout)
    with pytest.raises(ValueError, match="scout"):
        Volume.load(tmp_path, series=series)
    assert Volume.load(tmp_path, series=f"{series}#1").shape == (5, 6, 8)


def test_time_points_in_one_series_are_told_apart(tmp_path):
    def at(time):
        def change(image, number):
            image.AcquisitionNumber = time
            image.PixelData = pixels(number + 50 * time).tobytes()

        return change

    series = write_series(tmp_path / "1", change=at(1))
    write_series(tmp_path / "2", change=at(2), series=series)
    with pytest.raises(ValueError, match=f"{series}#2"):
        Volume.load(tmp_path)
    array = Volume.load(tmp_path, series=f"{series}#2").array
    assert array[0, 0, 0] == 2 * pixels(100)[0, 0] - 1024


def test_an_enhanced_multi_frame_image_is_read(tmp_path):
    write_enhanced(tmp_path / "mr.dcm")
    volume = Volume.load(tmp_path / "mr.dcm")
    assert np.array_equal(volume.array, expected_array(4))
    assert np.allclose(volume.affine, expected_affine(AXIAL))
    write_enhanced(tmp_path / "mr.dcm", times=2)
    with pytest.raises(ValueError, match="--series"):
        Volume.load(tmp_path / "mr.dcm")


def test_monochrome1_is_inverted_where_values_have_no_unit(tmp_path):
    def inverse(modality):
        def change(image, number):
            image.Modality, image.PhotometricInterpretation = modality, "MONOCHROME1"

        return change

    write_series(tmp_path / "ct", change=inverse("CT"))
    write_series(tmp_path / "mr", change=inverse("MR"))
    assert np.array_equal(Volume.load(tmp_path / "ct").array, expected_array(8))
    mr = Volume.load(tmp_path / "mr").array
    assert np.array_equal(mr + expected_array(8), np.full(mr.shape, 2 * 65535 - 2 * 1024))


def test_jpeg_lossless_is_read(tmp_path):
    pytest.importorskip("gdcm", reason="needs the extra dicom")
    write_series(tmp_path)
    for path in tmp_path.iterdir():
        as_jpeg_lossless(path)
    assert np.array_equal(Volume.load(tmp_path).array, expected_array(8))


def test_an_unreadable_compression_is_named(tmp_path):
    def video(image, number):
        image.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
        image.PixelData = pydicom.encaps.encapsulate([b"\0" * 8])

    write_series(tmp_path, change=video)
    with pytest.raises(ValueError, match="MPEG2"):
        Volume.load(tmp_path)


@pytest.mark.parametrize("kept", [0.2, 0.98])
def test_a_truncated_file_is_named(tmp_path, kept):
    write_series(tmp_path)
    content = (tmp_path / "IM0004").read_bytes()
    (tmp_path / "IM0004").write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="IM0004"):
        Volume.load(tmp_path)


def test_a_header_that_claims_too_much_is_refused(tmp_path):
    def huge(image, number):
        image.Rows = image.Columns = 65535

    write_series(tmp_path, change=huge)
    with pytest.raises(ValueError, match="GiB"):
        Volume.load(tmp_path)


def test_real_series_agree_with_simpleitk(shared_data):
    sitk = pytest.importorskip("SimpleITK", reason="needs the extra itk")
    names = ["pelvis_mr", "hitachi_anatomical_001", "generic_anatomical_002_non_isotropic"]
    names += [f"generic_compressed_{kind}_001" for kind in ("j2k", "jpeg", "jpegls", "rle")]
    for name in names:
        folder = shared_data / "dicom" / name
        volume = Volume.load(folder)
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
        image = sitk.ReadImage(files)
        origin = volume.affine @ [0, 0, 0, 1]
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        assert np.allclose(volume.affine, FLIP @ affine, rtol=0, atol=2e-4), (name, origin)
        assert np.allclose(volume.array.T, sitk.GetArrayFromImage(image), atol=1e-4), name


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("failing_gantrytilting_001", "tilted"),
        ("failing_notavolume_001", "--series"),
        ("failing_sliceincrement_001", "missing"),
        ("failing_sliceincrement_002", "tilted"),
        ("failing_sliceorientation_001", "--series"),
        ("generic_rgb_001", "RGB"),
    ],
)
def test_real_series_with_faults_are_refused(shared_data, name, token):
    with pytest.raises(ValueError, match=token):
        Volume.load(shared_data / "dicom" / name)
