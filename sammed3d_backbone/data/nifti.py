"""NIfTI file <-> array, affine and header.

A header is data from elsewhere: voxels are read only as far as it says that there are some, and a
file with more or fewer is refused.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from sammed3d_backbone.data.limits import require_spacing

SUFFIXES = (".nii", ".nii.gz")
ABOUT_THE_SOURCE = (  # fields of a header that say what an image shows
    "descrip",
    "aux_file",
    "db_name",
    "data_type",
    "intent_code",
    "intent_name",
    "intent_p1",
    "intent_p2",
    "intent_p3",
)
QUATERNION_ROUNDING = 1e-3
UNITS = {1: ("meter", 1000.0), 3: ("micron", 0.001)}  # name and mm of the header's xyzt_units
CHUNK_BYTES = 2**24
SPARE_BYTES = 2**24  # bytes behind the voxels that are tolerated
MAX_BYTES = 2**36


def read_nifti(
    path: Path,
) -> tuple[NDArray[np.float32], NDArray[np.float64], nib.nifti1.Nifti1Header]:
    """Voxels, affine in mm and header of a file; a fourth axis comes first.

    Shapes:
        returns: (X, Y, Z) or (C, X, Y, Z), and (4, 4).

    Raises:
        ValueError: If it is not a readable NIfTI image.
    """
    try:
        with path.open("rb") if path.suffix.lower() == ".nii" else gzip.open(path) as file:
            content = _read(path, file)
        kind = nib.Nifti2Image if content[4:7] == b"n+2" else nib.Nifti1Image
        image = kind.from_bytes(content)
        _require_one_number_per_voxel(path, image.get_data_dtype())
        array = np.asarray(image.dataobj, dtype=np.float32)
    except (
        WrapStructError,
        HeaderDataError,
        ImageFileError,
        EOFError,
        OSError,
        OverflowError,
        zlib.error,
    ) as error:
        reason = str(error).replace("\n", " ")
        raise ValueError(
            f"{path} cannot be read as NIfTI ({reason}); copy or convert it again"
        ) from None
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 5 and array.shape[3] == 1:
        array = array[:, :, :, 0]  # ITK's vectors: the fourth axis is time
    if array.ndim == 4:
        array = np.moveaxis(array, -1, 0)  # (C, X, Y, Z)
    header, affine = image.header.copy(), np.asarray(image.affine, dtype=np.float64)
    codes = int(header["xyzt_units"])  # of space in three bits, of time above; some are not valid
    if codes % 8 in UNITS:
        unit, mm = UNITS[codes % 8]
        affine[:3] *= mm
        header["xyzt_units"] = codes - codes % 8 + 2
        try:
            require_spacing(np.linalg.norm(affine[:3, :3], axis=0))
        except ValueError as error:
            raise ValueError(f"{path}: {error} (its header gives {unit}s)") from None
    return array, affine, header


def nifti_image(
    array: NDArray[Any],
    affine: NDArray[np.float64],
    header: nib.nifti1.Nifti1Header | None,
) -> nib.nifti1.Nifti1Image:
    """Nibabel's image; type, scaling and shape are those of the array.

    Args:
        array: The voxels.
        affine: Voxel -> RAS+ mm.
        header: Header of the image that the array belongs to; its codes and units are kept. What
            it says in words, in its intent or in extensions is not: it is about another image, and
            may name a person.

    Shapes:
        array: (X, Y, Z) or (C, X, Y, Z).
    """
    array = array if array.ndim == 3 else np.moveaxis(array, 0, -1)
    if header is not None:
        header = header.copy()
        header.set_data_dtype(array.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0
        for name in ABOUT_THE_SOURCE:
            if name in header:
                header[name] = np.zeros_like(header[name])
        header.extensions = type(header.extensions)()
    is_second = isinstance(header, nib.Nifti2Header)
    kind: type[nib.Nifti1Image] = nib.Nifti2Image if is_second else nib.Nifti1Image
    return kind(array, affine, header)


def _require_one_number_per_voxel(path: Path, dtype: np.dtype[Any]) -> None:
    """Refuses colours and complex numbers, of which a plain conversion keeps a part at most."""
    if dtype.fields is not None:
        raise ValueError(
            f"{path} holds colours of type {dtype} instead of intensities; convert it to one "
            "number per voxel, or store its channels along a fourth axis"
        )
    if dtype.kind == "c":
        raise ValueError(
            f"{path} holds complex numbers of type {dtype}; save their magnitude, or real and "
            "imaginary part along a fourth axis"
        )


def _require_pixdim(path: Path, header: nib.nifti1.Nifti1Header) -> None:
    """Refuses a side of 0, which nibabel takes as 1 mm, where the spacing depends on it."""
    sides = zip(header["dim"][1:4], header["pixdim"][1:4], strict=True)
    if header["sform_code"] <= 0 and any(n > 1 and mm == 0 for n, mm in sides):
        raise ValueError(f"{path} has a pixdim of 0 and no sform; write its spacing in mm")


def _read(path: Path, file: IO[bytes] | gzip.GzipFile) -> bytes:
    """The bytes of a NIfTI file, unpacked only as far as its header says that there are voxels.

    A single file begins with at least 352 (NIfTI-2: 544) bytes of header. Writers that leave
    vox_offset at 0 mean that place; read literally, the header would become voxels. A quaternion
    that is too long by rounding is shortened; an impossible one beside an sform is not used.
    """
    content = bytearray(file.read(544))
    is_second = content[4:7] == b"n+2"
    kind = nib.Nifti2Header if is_second else nib.Nifti1Header
    first = 544 if is_second else 352
    # Four zeros in place of extensions, which may be longer than what was read.
    head = content[: first - 4] + bytes(4)
    header = kind.from_fileobj(io.BytesIO(head))
    _require_pixdim(path, kind.from_fileobj(io.BytesIO(head), check=False))
    b, c, d = (float(header[f"quatern_{axis}"]) for axis in "bcd")
    if (length := math.hypot(b, c, d)) > 1:
        if length < 1 + QUATERNION_ROUNDING:
            for axis in "bcd":
                header[f"quatern_{axis}"] = header[f"quatern_{axis}"] / length
        elif header["sform_code"] > 0:
            header["qform_code"] = 0
        else:
            raise ValueError(
                f"{path} has a qform with a quaternion of length {length:g}, at most 1 is "
                "possible, and no sform; correct its header"
            )
    given = float(header["vox_offset"])
    if not given >= first:
        if any(content[first - 4 : first - 3]):
            raise ValueError(f"{path} has vox_offset {given:g} and extensions; convert it again")
        header["vox_offset"] = given = first
    content[: len(header.binaryblock)] = header.binaryblock
    shape = header.get_data_shape()
    needed = math.prod(shape) * header.get_data_dtype().itemsize
    if not shape or min(shape) < 1 or needed + given > MAX_BYTES:
        raise ValueError(f"{path} claims {shape} voxels in its header; copy or convert it again")
    size = int(given) + needed
    while len(content) < size + SPARE_BYTES and (more := file.read(CHUNK_BYTES)):
        content += more  # to the end, so that gzip compares its checksum
    if not size <= len(content) < size + SPARE_BYTES:
        raise ValueError(
            f"{path} does not hold the {shape} voxels that its header claims: {size:,} bytes are "
            f"needed, {len(content):,} {'or more ' * (len(content) > size)}are there; copy or "
            "convert it again"
        )
    return bytes(content)
