"""Small DICOM series, whole or with one fault."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    JPEGLosslessSV1,
    generate_uid,
)

ROWS, COLUMNS = 6, 5
STEP_MM = 2.5
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
ORIGIN_MM = np.array([-31.25, -40.5, 17.125])
PATIENT = "Nobody^Test"


def pixels(number):
    """Stored values of a slice, (rows, columns)."""
    return (np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) + 100 * number).astype(np.uint16)


def write_series(
    folder,
    *,
    slices=8,
    orientation=AXIAL,
    offsets_mm=None,
    skip=(),
    shuffle=True,
    series=None,
    change=lambda image, number: None,
):
    """Writes a CT series of files and returns the UID of the series.

    `offsets_mm` (N, 3) moves slices, `skip` leaves some out, `change` edits an image before it is
    written. The files are named in a random order of the slices.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    series = series or generate_uid()
    study, frame = generate_uid(entropy_srcs=["study"]), generate_uid(entropy_srcs=["frame"])
    axes = np.reshape(orientation, (2, 3))
    names = np.random.default_rng(3).permutation(slices) if shuffle else range(slices)
    for number, name in enumerate(names):
        position = ORIGIN_MM + number * STEP_MM * np.cross(*axes)
        if offsets_mm is not None:
            position = position + offsets_mm[number]
        image = _image(CTImageStorage, study, series)
        image.Modality, image.InstanceNumber = "CT", number + 1
        image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        image.FrameOfReferenceUID = frame
        image.ImagePositionPatient = [float(f"{mm:.6f}") for mm in position]
        image.ImageOrientationPatient = [float(f"{cosine:.10f}") for cosine in axes.ravel()]
        image.PixelSpacing = [0.75, 0.5]  # rows, columns
        image.SliceThickness = STEP_MM
        image.RescaleSlope, image.RescaleIntercept = 2, -1024
        image.PixelData = pixels(number).tobytes()
        change(image, number)
        if number not in skip:
            image.save_as(Path(folder) / f"IM{name:04d}", enforce_file_format=True)
    return series


def write_enhanced(path, *, slices=4, times=1):
    """Writes a multi-frame MR image, its frames in a mixed order."""
    image = _image(EnhancedMRImageStorage, generate_uid(), generate_uid())
    image.Modality, image.InstanceNumber = "MR", 1
    image.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    image.FrameOfReferenceUID = generate_uid()
    image.NumberOfFrames = slices * times
    shared = Dataset()
    shared.PlaneOrientationSequence = [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = list(AXIAL)
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = [0.75, 0.5]
    shared.PixelMeasuresSequence[0].SliceThickness = STEP_MM
    image.SharedFunctionalGroupsSequence = [shared]
    frames, order = [], [(s, t) for t in range(times) for s in np.roll(range(slices), 1)]
    for number, time in order:
        frame = Dataset()
        frame.PlanePositionSequence = [Dataset()]
        position = ORIGIN_MM + number * STEP_MM * np.array([0, 0, 1])
        frame.PlanePositionSequence[0].ImagePositionPatient = position.tolist()
        frame.FrameContentSequence = [Dataset()]
        frame.FrameContentSequence[0].TemporalPositionIndex = time + 1
        transform = Dataset()
        transform.RescaleSlope, transform.RescaleIntercept = 2, -1024
        transform.RescaleType = "US"
        frame.PixelValueTransformationSequence = [transform]
        frames.append(frame)
    image.PerFrameFunctionalGroupsSequence = frames
    image.PixelData = b"".join(pixels(number + 1000 * t).tobytes() for number, t in order)
    image.save_as(path, enforce_file_format=True)


def as_jpeg_lossless(path):
    """Rewrites a file as JPEG lossless, the commonest compression in archives."""
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == JPEGLosslessSV1


def _image(kind, study, series):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    image.PatientName, image.PatientID, image.PatientSex = PATIENT, "4711", "O"
    image.PatientBirthDate = image.StudyDate = "19700101"
    image.StudyTime, image.StudyID, image.AccessionNumber = "120000", "1", ""
    image.StudyInstanceUID, image.SeriesInstanceUID, image.SeriesNumber = study, series, 3
    image.Rows, image.Columns = ROWS, COLUMNS
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation = 15, 0
    return image
