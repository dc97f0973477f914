"""Labels -> DICOM-SEG, beside the DICOM series that they belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.dicom import DicomSeries, quiet

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription

MAKER = "sammed3d_backbone"
LABEL_CHARACTERS = 64  # of DICOM's long strings
# Category, and the context group with the structures of that category.
CATEGORIES = {
    "Tissue": "cid7191",
    "MorphologicallyAbnormalStructure": "cid7194",
    "AnatomicalStructure": "cid7192",
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
    target: Path | BinaryIO,
    labels: NDArray[Any],
    affine: NDArray[np.float64],
    series: DicomSeries,
    names: Mapping[int, str],
) -> None:
    """Writes a segmentation or replaces its file, a segment for each label in their order.

    Patient and study are those of the series. Frames without a voxel are written, because viewers
    misplace segmentations that leave them out; labels without a voxel are not, because viewers
    crash on them.

    Args:
        target: The file.
        labels: Integers, 0 is background.
        affine: Voxel -> RAS+ mm, that of the series.
        series: What was segmented.
        names: Names of the labels; others are called "label N".

    Shapes:
        labels: (X, Y, Z).

    Raises:
        ValueError: If no voxel has a label, or the series does not say what a segmentation needs.
    """
    import highdicom
    import pydicom
    from highdicom.seg import Segmentation

    is_present = np.zeros(int(labels.max()) + 1, bool)
    for plane in labels:  # a plane at a time, since indices take eight bytes
        is_present[plane] = True
    is_present[0] = False
    if not is_present.any():
        raise ValueError("no voxel has a label, and a DICOM-SEG needs a segment")
    number_of = (is_present.cumsum() * is_present).astype(np.uint16)
    numbers = np.stack([number_of[plane] for plane in labels])
    with quiet():
        images = [pydicom.dcmread(file, stop_before_pixels=True) for file in series.files]
        for image in images:
            for keyword in MAY_BE_EMPTY:
                if keyword not in image:
                    setattr(image, keyword, None)
        frames: Any = numbers.T  # each on the image that it belongs to
        if len(images) == 1:  # whose frames may lie in another order
            signs = np.diag([-1.0, -1.0, 1.0, 1.0])
            frames = highdicom.Volume(
                frames,
                signs @ affine[:, [2, 1, 0, 3]],
                coordinate_system="PATIENT",
                frame_of_reference_uid=series.frame_of_reference,
            )
        try:
            segmentation = Segmentation(
                source_images=images,
                pixel_array=frames,
                segmentation_type="BINARY",
                segment_descriptions=[
                    _segment(number, names.get(value, f"label {value}"))
                    for number, value in enumerate(np.flatnonzero(is_present).tolist(), start=1)
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
                specific_character_set="ISO_IR 192",  # UTF-8
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the series lacks what a DICOM-SEG needs ({error}); write .nii.gz"
            ) from None
        segmentation.save_as(target)


def _segment(number: int, name: str) -> SegmentDescription:
    """The description of a segment, with a code if its name is known."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    words = _words(name)
    known = {
        _words(code.meaning): (getattr(codes.SCT, keyword), code)
        for keyword, group in CATEGORIES.items()
        for code in getattr(codes, group).concepts.values()
    }
    unknown = (codes.SCT.AnatomicalStructure, codes.SCT.AnatomicalStructure)
    category, kind = known.get(words) or known.get(words.difference(SIDES)) or unknown
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
