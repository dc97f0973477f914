"""A DICOM series -> voxels and affine, without a guess.

Other readers sort the slices of a series and take the distance of the first two, or the mean, for
all of them; a missing slice, a tilted gantry or two stacks in one series then give a volume of the
wrong size without a word. Here every slice has to lie where the affine says, and what does not is
refused with the name of the slice.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.limits import require_size, require_spacing

if TYPE_CHECKING:
    from pydicom import Dataset

TOLERANCE = 0.01  # of the distance of two slices: how far a slice may lie from the regular grid
MAX_TOLERANCE = 0.25  # of the distance; with more, a missing slice would pass for irregular
SAME_MM = 0.001
MAX_TILT_DEG = 0.5  # a smaller one is reported as irregular spacing

# Sequence and attribute that tell images at one place apart, the most telling first.
REPEATS = (
    ("FrameContentSequence", "TemporalPositionIndex"),
    ("", "TemporalPositionIdentifier"),
    ("MREchoSequence", "EffectiveEchoTime"),
    ("", "EchoTime"),
    ("MRDiffusionSequence", "DiffusionBValue"),
    ("MRImageFrameTypeSequence", "FrameType"),
    ("CTImageFrameTypeSequence", "FrameType"),
    ("", "ImageType"),
    ("", "AcquisitionNumber"),
    ("", "TriggerTime"),
    ("", "AcquisitionTime"),
)
# Values with a unit of their own, whatever a screen shows for them.
PHYSICAL = ("CT", "PT")


@dataclass(frozen=True)
class DicomSeries:
    """The series that a volume was read from.

    Args:
        files: Its files in the order of the slices, or one multi-frame file.
        modality: As DICOM writes it, for example "CT".
        frame_of_reference: UID of the space that it shares with other series; "" if not given.
    """

    files: tuple[Path, ...]
    modality: str
    frame_of_reference: str


@dataclass(frozen=True, eq=False)
class _Slice:
    """An image of a series, or a frame of a multi-frame image.

    Shapes:
        position_mm: (3,), centre of the first pixel, in DICOM's coordinates (left, posterior, up).
        axes: (2, 3), unit vectors along a row and along a column.
        pixel_mm: (2,), distance of rows and of columns.
    """

    file: Path
    frame: int  # counted from 1
    header: Dataset
    position_mm: NDArray[np.float64]
    axes: NDArray[np.float64]
    pixel_mm: NDArray[np.float64]
    stack: tuple[Any, ...]
    repeat: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.file.name if self.frame == 1 else f"{self.file.name}, frame {self.frame}"

    def is_beside(self, other: _Slice) -> bool:
        """Whether both can be slices of one volume."""
        return (
            self.stack == other.stack
            and np.allclose(self.axes, other.axes, rtol=0, atol=1e-4)
            and np.allclose(self.pixel_mm, other.pixel_mm, rtol=1e-4)
        )


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


@contextmanager
def quiet() -> Iterator[None]:
    """Holds back pydicom's and highdicom's warnings, which repeat values of tags, such as names."""
    for library in ("pydicom", "highdicom"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_dicom(
    path: Path, series: str | None = None, slice_tolerance_mm: float | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float64], DicomSeries]:
    """Voxels with their rescaling applied, the affine, and what the volume belongs to.

    The axes are columns, rows and slices of the images, as in ITK; the slices are ordered along the
    normal of the images. Values of MONOCHROME1 are inverted except in CT and PET.

    Args:
        path: A folder, with its folders, or a file, which stands for its series in its folder.
        series: UID of the series; needed where there are several.
        slice_tolerance_mm: How far a slice may lie from a regular grid; None for 1 % of the
            distance of two slices.

    Shapes:
        returns: (X, Y, Z) and (4, 4), voxel -> RAS+ mm.

    Raises:
        ValueError: If there is not exactly one series, its slices are no regular stack, or an
            image cannot be decoded.
    """
    with quiet():
        chosen = _choose(path, _stacks(path), series)
        ordered, affine = _regular(path, chosen, slice_tolerance_mm)
        first = ordered[0].header
        shape = (int(first.Columns), int(first.Rows), len(ordered))
        try:
            spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
            require_spacing(spacing_mm)
            require_size(shape, spacing_mm)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        array = np.empty(shape[::-1], np.float32)
        for place, voxels in zip(array, _frames(ordered), strict=True):
            place[...] = voxels
    files = tuple(dict.fromkeys(one.file for one in ordered))
    modality, frame = str(first.get("Modality", "")), str(first.get("FrameOfReferenceUID", ""))
    return array.T, affine, DicomSeries(files, modality, frame)


# --- which series ------------------------------------------------------------------------------


def _stacks(path: Path) -> dict[str, list[_Slice]]:
    """The stacks of images with a place in space, by the UID of their series."""
    groups: list[list[_Slice]] = []
    seen = set()
    for file in sorted(path.rglob("*") if path.is_dir() else path.parent.iterdir()):
        for one in _slices(file):
            place = (one.header.get("SOPInstanceUID"), one.frame, *one.position_mm)
            if place in seen:
                continue  # a copy of a file
            seen.add(place)
            group = next((group for group in groups if one.is_beside(group[0])), None)
            groups.append([one]) if group is None else group.append(one)
    by_series: dict[str, list[list[_Slice]]] = {}
    for group in groups:
        by_series.setdefault(str(group[0].stack[0]), []).extend(_parted(group))
    return {
        uid if len(parts) == 1 else f"{uid}#{number}": part
        for uid, parts in by_series.items()
        for number, part in enumerate(parts, start=1)
    }


def _slices(file: Path) -> list[_Slice]:
    """The images of a file that have a place in space; none if it is not a DICOM image.

    Raises:
        ValueError: If it is a DICOM file and damaged.
    """
    import pydicom

    if not file.is_file() or not is_dicom(file):
        return []
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)
        kind = pydicom.uid.UID(header.file_meta.get("MediaStorageSOPClassUID", ""))
        if "Image Storage" not in kind.name:
            return []  # segmentations, plans, reports, DICOMDIR
        frames = header.get("PerFrameFunctionalGroupsSequence", [None])
        if len(frames) != int(header.get("NumberOfFrames") or 1):
            return []  # frames without a place: angiography, older ultrasound
        return [
            one
            for number, frame in enumerate(frames, start=1)
            if (one := _slice(file, header, number, frame)) is not None
        ]
    except Exception as error:  # noqa: BLE001 (pydicom raises what it meets)
        raise ValueError(
            f"{file} is damaged DICOM ({type(error).__name__}); copy or export it again"
        ) from None


def _slice(file: Path, header: Dataset, number: int, frame: Dataset | None) -> _Slice | None:
    """An image or frame with its place, or None if it has none."""

    def find(sequence: str, keyword: str) -> Any:  # noqa: ANN401
        shared = header.get("SharedFunctionalGroupsSequence") or [None]
        for groups in (frame, shared[0]):
            items = None if groups is None or not sequence else groups.get(sequence)
            if items and keyword in items[0]:
                return items[0][keyword].value
        return header.get(keyword)

    stack = (
        header.SeriesInstanceUID,
        header.Rows,
        header.Columns,
        header.get("FrameOfReferenceUID"),
        header.SOPInstanceUID if frame is not None else None,
        find("FrameContentSequence", "StackID") if frame is not None else None,
    )
    position = find("PlanePositionSequence", "ImagePositionPatient")
    orientation = find("PlaneOrientationSequence", "ImageOrientationPatient")
    spacing = find("PixelMeasuresSequence", "PixelSpacing")
    if not position or not orientation or not spacing:
        return None
    numbers = np.array([*position, *orientation, *spacing], dtype=np.float64)
    if numbers.shape != (11,) or not np.isfinite(numbers).all():
        raise ValueError
    repeat = tuple(str(find(*names)) for names in REPEATS)
    axes, pixel_mm = numbers[3:9].reshape(2, 3), numbers[9:]
    return _Slice(file, number, header, numbers[:3], axes, pixel_mm, stack, repeat)


def _parted(group: list[_Slice]) -> list[list[_Slice]]:
    """Stacks that lie at the same places, such as time points, apart."""
    if not _at_one_place(group):
        return [group]
    for number in range(len(REPEATS)):
        parts: dict[str, list[_Slice]] = {}
        for one in group:
            parts.setdefault(one.repeat[number], []).append(one)
        if not any(map(_at_one_place, parts.values())):
            return list(parts.values())
    return [group]


def _at_one_place(group: Sequence[_Slice]) -> tuple[_Slice, _Slice] | None:
    """Two images that lie at the same place."""
    first: dict[tuple[float, ...], _Slice] = {}
    for one in group:
        other = first.setdefault(tuple(np.round(one.position_mm / SAME_MM)), one)
        if other is not one:
            return other, one
    return None


def _choose(path: Path, stacks: dict[str, list[_Slice]], series: str | None) -> list[_Slice]:
    """The one stack, or the one of a series.

    Raises:
        ValueError: If there is none, or several.
    """
    if path.is_file():
        stacks = {
            uid: stack for uid, stack in stacks.items() if path in {one.file for one in stack}
        }
    if not stacks:
        raise ValueError(
            f"{path} holds no DICOM image with a position in space; give the folder of a CT, MR or "
            "PET series"
        )
    found = {
        uid: stack for uid, stack in stacks.items() if series in (None, uid, uid.partition("#")[0])
    }
    if len(found) == 1:
        return next(iter(found.values()))
    lines = [_described(uid, stack) for uid, stack in (found or stacks).items()]
    asked = f"no series {series}" if series and not found else f"{len(lines)} series or stacks"
    raise ValueError(
        f"{path} holds {asked}; choose one by --series UID (series= in Python):\n"
        + "\n".join(lines)
    )


def _described(uid: str, stack: list[_Slice]) -> str:
    """A line of a list of series."""
    header = stack[0].header
    kind = ", scout" if "LOCALIZER" in (header.get("ImageType") or ()) else ""
    return (
        f"  {uid}  {header.get('Modality')} {header.Columns} x {header.Rows} x {len(stack)}{kind}"
        f"  {header.get('SeriesDescription') or ''}"
    ).rstrip()


# --- where its slices lie ----------------------------------------------------------------------


def _regular(
    path: Path, stack: list[_Slice], tolerance_mm: float | None
) -> tuple[list[_Slice], NDArray[np.float64]]:
    """The slices along their normal, and the affine on which all of them lie.

    Raises:
        ValueError: If one lies elsewhere; the message names it.
    """
    first = stack[0]
    normal = np.cross(*first.axes)
    if not np.allclose(first.axes @ first.axes.T, np.eye(2), atol=1e-3):
        raise ValueError(
            f"{path}: the directions in {first.name} are not at right angles; export it again"
        )
    normal /= np.linalg.norm(normal)
    ordered = sorted(stack, key=lambda one: float(one.position_mm @ normal))
    positions = np.array([one.position_mm for one in ordered])
    gaps = np.diff(positions @ normal)
    if len(gaps) and gaps.min() < SAME_MM:
        at = int(gaps.argmin())
        raise ValueError(
            f"{path}: {ordered[at].name} and {ordered[at + 1].name} lie in the same plane, and no "
            "tag tells their time points, echoes or kinds apart; leave one of each in the folder"
        )
    if len(ordered) == 1:
        step = _thickness(path, first)
    else:
        step = float((positions[-1] - positions[0]) @ normal) / (len(ordered) - 1)
    _require_regular(path, ordered, positions, normal, step, tolerance_mm)
    affine = np.eye(4)
    affine[:3, 0] = first.axes[0] * first.pixel_mm[1]
    affine[:3, 1] = first.axes[1] * first.pixel_mm[0]
    affine[:3, 2] = normal * step
    affine[:3, 3] = positions[0]
    affine[:2] *= -1  # left and posterior to right and anterior
    return ordered, affine + 0.0  # no negative zeros


def _thickness(path: Path, only: _Slice) -> float:
    """The distance that slices would have, of a single one."""
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        if value := only.header.get(keyword):
            return abs(float(value))
    raise ValueError(
        f"{path} holds one image, {only.name}, of unknown thickness; give a series of several"
    )


def _require_regular(
    path: Path,
    ordered: list[_Slice],
    positions: NDArray[np.float64],
    normal: NDArray[np.float64],
    step: float,
    tolerance_mm: float | None,
) -> None:
    """Refuses a stack one of whose slices lies off the regular grid.

    Shapes:
        positions: (N, 3), in the order of the slices.
        normal: (3,).
    """
    given = f"slice_tolerance_mm={tolerance_mm}"
    if tolerance_mm is not None and not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"{given}: expected a distance in mm")
    expected = positions[0] + np.arange(len(ordered))[:, None] * step * normal
    off = positions - expected
    off_mm = np.linalg.norm(off, axis=1)
    allowed = TOLERANCE * step if tolerance_mm is None else min(tolerance_mm, MAX_TOLERANCE * step)
    if off_mm.max() <= allowed:
        return
    gaps = np.diff(positions @ normal)
    beside = np.linalg.norm(off - np.outer(off @ normal, normal), axis=1)
    worst = int(beside.argmax())
    tilt = math.degrees(math.atan2(beside[worst], abs((positions[worst] - positions[0]) @ normal)))
    if beside[worst] > allowed and tilt > MAX_TILT_DEG:
        raise ValueError(
            f"{path}: the slices are tilted by {tilt:.1f} degrees against their stack (gantry "
            f"tilt): {ordered[worst].name} lies {beside[worst]:.1f} mm beside the line of the "
            f"first; straighten the series first, for example with dcm2niix"
        )
    usual = float(gaps.min())
    ratios = gaps / usual
    missing = np.round(ratios).astype(int) - 1
    if missing.max() > 0 and np.abs(ratios - np.round(ratios)).max() < MAX_TOLERANCE:
        at = int(missing.argmax())
        places = int((missing > 0).sum())
        more = f", and more in {places - 1} other places" if places > 1 else ""
        count = "a slice is" if missing[at] == 1 else f"{missing[at]} slices are"
        raise ValueError(
            f"{path}: {count} missing between {ordered[at].name} and "
            f"{ordered[at + 1].name} ({gaps[at]:.3f} mm apart, others {usual:.3f}){more}; export "
            "the series again"
        )
    usual = float(np.median(gaps))
    at = int(np.abs(gaps - usual).argmax())
    enough = math.ceil(off_mm.max() * 1000) / 1000
    remedy = (
        f"allow it by --slice-tolerance {enough:g} (slice_tolerance_mm= in Python), or export"
        if enough <= MAX_TOLERANCE * step
        else "export"
    )
    raise ValueError(
        f"{path}: irregular slices: {gaps[at]:.3f} mm between {ordered[at].name} and "
        f"{ordered[at + 1].name}, others {usual:.3f}, and {off_mm.max():.3f} mm off a regular grid "
        f"at most; {remedy} the series again"
    )


# --- what is in them ---------------------------------------------------------------------------


def _frames(ordered: list[_Slice]) -> Iterator[NDArray[np.float32]]:
    """The rescaled pixels of each slice, (rows, columns).

    Raises:
        ValueError: If an image is colour or cannot be decoded.
    """
    import highdicom

    open_image = lru_cache(1)(highdicom.imread)  # a multi-frame file once
    for one in ordered:
        header = one.header
        if not str(header.get("PhotometricInterpretation")).startswith("MONOCHROME"):
            raise ValueError(
                f"{one.file} holds colours ({header.get('PhotometricInterpretation')}) instead of "
                "intensities; give a series of one number per pixel"
            )
        syntax = header.file_meta.TransferSyntaxUID
        try:
            yield open_image(one.file).get_frame(
                one.frame,
                dtype=np.float32,
                apply_real_world_transform=False,
                apply_voi_transform=False,
                apply_presentation_lut=header.get("Modality") not in PHYSICAL,
            )
        except Exception as error:  # noqa: BLE001 (decoders raise what they meet)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{one.file} ({syntax.name}) cannot be decoded: {reason}; export it again, "
                "uncompressed"
            ) from None
