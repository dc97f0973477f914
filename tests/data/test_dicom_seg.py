"""Labels of a DICOM series are written as DICOM-SEG that others read back at the same place."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
highdicom = pytest.importorskip("highdicom", reason="needs the extra dicom")

from dicom_series import CORONAL, PATIENT, write_enhanced, write_series  # noqa: E402

from sammed3d_backbone.data.volume import Volume  # noqa: E402

NAMES = {1: "kidney_left", 2: "my own thing"}


def labels_of(scan):
    """Two boxes; the first and the last slice hold nothing."""
    labels = np.zeros(scan.shape, np.uint8)
    labels[1:3, 2:4, 1:-2], labels[3:, :2, 2:-1] = 1, 2
    return Volume(labels, scan.affine, scan.header)


def segmented(tmp_path, *, enhanced=False):
    if enhanced:
        (tmp_path / "series").mkdir()
        write_enhanced(tmp_path / "series" / "mr.dcm", slices=6)
    else:
        write_series(tmp_path / "series", orientation=CORONAL)
    labels = labels_of(Volume.load(tmp_path / "series"))
    labels.save(tmp_path / "seg.dcm", names=NAMES)
    return labels


@pytest.mark.parametrize("enhanced", [False, True])
def test_a_segmentation_is_read_back_voxel_by_voxel(tmp_path, enhanced):
    labels = segmented(tmp_path, enhanced=enhanced)
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    volume = seg.get_volume(combine_segments=True).flip_spatial(0)
    back = np.diag([-1, -1, 1, 1]) @ volume.affine[:, [2, 1, 0, 3]]
    assert np.array_equal(volume.array.T, labels.array)
    assert np.allclose(back, labels.affine, rtol=0, atol=1e-6)
    assert seg.NumberOfFrames == 2 * labels.shape[2]  # empty ones too


def test_a_segmentation_belongs_to_its_series(tmp_path):
    segmented(tmp_path)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    source = pydicom.dcmread(tmp_path / "series" / "IM0000")
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[keyword].value == source[keyword].value
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    for frame in seg.PerFrameFunctionalGroupsSequence:
        assert frame.DerivationImageSequence[0].SourceImageSequence


def test_a_frame_lies_where_its_image_lies_however_irregular(tmp_path):
    shift = np.random.default_rng(0).uniform(-0.05, 0.05, (8, 1)) * [0, 0, 1]
    write_series(tmp_path / "series", offsets_mm=shift)
    scan = Volume.load(tmp_path / "series", slice_tolerance_mm=0.2)
    labels = Volume((scan.array > scan.array.mean()).astype(np.uint8), scan.affine, scan.header)
    labels.save(tmp_path / "seg.dcm")
    images = {}
    for path in (tmp_path / "series").iterdir():
        image = pydicom.dcmread(path)
        images[image.SOPInstanceUID] = image
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert len(seg.PerFrameFunctionalGroupsSequence) == 8
    for frame, mask in zip(seg.PerFrameFunctionalGroupsSequence, seg.pixel_array, strict=True):
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        image = images[source.ReferencedSOPInstanceUID]
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        assert position == image.ImagePositionPatient
        assert np.array_equal(mask, 2.0 * image.pixel_array - 1024 > scan.array.mean())


def test_known_names_get_their_codes(tmp_path):
    segmented(tmp_path)
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    kidney, own = (seg.get_segment_description(n) for n in (1, 2))
    assert (kidney.SegmentLabel, own.SegmentLabel) == ("kidney_left", "my own thing")
    code = kidney.SegmentedPropertyTypeCodeSequence[0]
    assert "kidney" in code.CodeMeaning.lower()
    side = code.get("SegmentedPropertyTypeModifierCodeSequence")
    assert "Left" in (code.CodeMeaning, side and side[0].CodeMeaning)
    assert own.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Anatomical Structure"


def test_names_in_any_script_are_kept(tmp_path):
    def named(image, number):
        image.SpecificCharacterSet = "ISO_IR 100"
        image.PatientName = "Müller^Zoë"

    write_series(tmp_path / "series", change=named)
    labels = labels_of(Volume.load(tmp_path / "series"))
    labels.save(tmp_path / "seg.dcm", names={1: "Leber, größer", 2: "肝"})
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert seg.PatientName == "Müller^Zoë"
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["Leber, größer", "肝"]


def test_labels_without_a_voxel_are_no_segments(tmp_path):
    write_series(tmp_path / "series")
    labels = labels_of(Volume.load(tmp_path / "series"))
    labels.array[labels.array == 2] = 3
    labels.save(tmp_path / "seg.dcm", names={1: "a", 2: "b", 3: "c"})
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["a", "c"]


def test_files_of_de_identified_series_are_enough(tmp_path):
    def anonymous(image, number):
        for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID"):
            delattr(image, keyword)

    write_series(tmp_path / "series", change=anonymous)
    labels_of(Volume.load(tmp_path / "series")).save(tmp_path / "seg.dcm")
    assert not pydicom.dcmread(tmp_path / "seg.dcm").PatientName


def test_no_name_of_a_patient_leaves_through_another_format(tmp_path):
    pytest.importorskip("nrrd", reason="needs the extra nrrd")
    pytest.importorskip("SimpleITK", reason="needs the extra itk")
    labels = segmented(tmp_path)
    assert PATIENT not in repr(labels)
    for name in ("out.nii", "out.nrrd", "out.mha"):
        labels.save(tmp_path / name)
        assert PATIENT.encode() not in (tmp_path / name).read_bytes()


def test_what_cannot_be_a_segmentation_is_refused(tmp_path):
    write_series(tmp_path / "series")
    scan = Volume.load(tmp_path / "series")
    empty = Volume(np.zeros(scan.shape, np.uint8), scan.affine, scan.header)
    with pytest.raises(ValueError, match=r"/seg\.dcm"):
        empty.save(tmp_path / "seg.dcm")
    elsewhere = Volume(np.ones(scan.shape, np.uint8), scan.affine)
    with pytest.raises(ValueError, match=r"seg\.nii\.gz"):
        elsewhere.save(tmp_path / "seg.dcm")

    def placeless(image, number):
        del image.FrameOfReferenceUID

    write_series(tmp_path / "series", change=placeless)
    with pytest.raises(ValueError, match="Frame of Reference"):
        labels_of(Volume.load(tmp_path / "series")).save(tmp_path / "seg.dcm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["series"]


@pytest.mark.slow
def test_dcmqi_reads_the_same_voxels(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="needs the extra itk")
    dcmqi = pytest.importorskip("dcmqi", reason="needs a second reader; pip install dcmqi")
    program = Path(dcmqi.__file__).parent / "bin" / "segimage2itkimage"
    labels = segmented(tmp_path)
    where = ["--inputDICOM", tmp_path / "seg.dcm", "--outputDirectory", tmp_path]
    how = ["--outputType", "nrrd", "--prefix", "back"]
    subprocess.run([program, *where, *how], check=True, capture_output=True)
    for value in NAMES:
        image = sitk.ReadImage(tmp_path / f"back-{value}.nrrd")
        i, j, k = np.nonzero(labels.array == value)
        assert np.count_nonzero(sitk.GetArrayViewFromImage(image)) == len(i)
        lps = (labels.affine @ [i, j, k, np.ones(len(i))])[:3] * [[-1], [-1], [1]]
        for point in lps.T.tolist():
            index = image.TransformPhysicalPointToContinuousIndex(point)
            assert np.abs(np.array(index) - np.round(index)).max() < 1e-3
            assert image[tuple(round(n) for n in index)]
