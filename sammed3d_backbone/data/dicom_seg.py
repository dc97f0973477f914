"""Labels -> DICOM-SEG, beside the DICOM series that they belong to."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.dicom import DicomSeries

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription

MAKER = "sammed3d_backbone"
LABEL_CHARACTERS = 64  # of DICOM's long strings
# Category, and the context group with the structures of that category.
CATEGORIES = {
    "AnatomicalStructure": "cid7192",
    "MorphologicallyAbnormalStructure": "cid7194",
    "Tissue": "cid7191",
}
SIDES = {"left": "Left", "right": "Right"}
# What is missing in de-identified files, and may be empty in a SEG.
MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)


def write_dicom_seg(
    path: Path,
    labels: NDArray[Any],
    affine: NDArray[np.float64],
    series: DicomSeries,
    names: Mapping[int, str],
) -> None:
    """Writes or replaces a segmentation of all labels, a segment each, with every frame.

    Patient and study are those of the series. Frames without a voxel are written too, because
    viewers misplace segmentations that leave them out.

    Args:
        path: The file.
        labels: Integers, 0 is background; segment numbers are the labels.
        affine: Voxel -> RAS+ mm, that of the series.
        series: What was segmented.
        names: Names of the labels; others are called "label N".

    Shapes:
        labels: (X, Y, Z).

    Raises:
        ValueError: If there is no label, or the files of the series are gone or cannot be used.
    """
    import highdicom
    import pydicom
    from highdicom.seg import Segmentation

    highest = int(labels.max())
    if highest < 1:
        raise ValueError(
            f"{path}: all labels are 0, and a DICOM-SEG needs a segment; nothing is written"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's repeat values of tags, such as names
        images = [pydicom.dcmread(file, stop_before_pixels=True) for file in series.files]
        for image in images:
            for keyword in MAY_BE_EMPTY:
                if keyword not in image:
                    setattr(image, keyword, None)
        signs = np.diag([-1.0, -1.0, 1.0, 1.0])
        volume = highdicom.Volume(
            labels.astype(np.uint8 if highest < 256 else np.uint16).T,
            signs @ affine[:, [2, 1, 0, 3]],
            coordinate_system="PATIENT",
            frame_of_reference_uid=images[0].get("FrameOfReferenceUID"),
        )
        segmentation = Segmentation(
            source_images=images,
            pixel_array=volume,
            segmentation_type="BINARY",
            segment_descriptions=[
                _segment(n, names.get(n, f"label {n}")) for n in range(1, highest + 1)
            ],
            series_instance_uid=highdicom.UID(),
            series_number=9000 + int(images[0].get("SeriesNumber") or 0) % 1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=MAKER,
            software_versions=_version(),
            device_serial_number="0",
            series_description=f"{MAKER} segmentation",
            omit_empty_frames=False,
        )
        segmentation.save_as(path)


def _segment(number: int, name: str) -> SegmentDescription:
    """The description of a segment, with a code if its name is known."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    words = _words(name)
    category, kind = codes.SCT.AnatomicalStructure, codes.SCT.AnatomicalStructure
    for keyword, group in CATEGORIES.items():
        for code in getattr(codes, group).concepts.values():
            if _words(code.meaning) in (words, words - SIDES.keys()):
                category, kind = getattr(codes.SCT, keyword), code
    segment = SegmentDescription(
        number,
        name[:LABEL_CHARACTERS],
        category,
        kind,
        "SEMIAUTOMATIC",
        AlgorithmIdentificationSequence(
            name=MAKER, family=codes.DCM.ArtificialIntelligence, version=_version()
        ),
    )
    for side in words & SIDES.keys() - _words(kind.meaning):
        code = getattr(codes.SCT, SIDES[side])
        item = segment.SegmentedPropertyTypeCodeSequence[0]
        item.SegmentedPropertyTypeModifierCodeSequence = [CodedConcept.from_code(code)]
    return segment


def _version() -> str:
    """The version of this package; a checkout that is not installed has none."""
    try:
        return version(MAKER)
    except PackageNotFoundError:
        return "unknown"


def _words(name: str) -> frozenset[str]:
    """The words of a name, as in kidney_left, LeftKidney and "Left kidney"."""
    return frozenset(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name))
