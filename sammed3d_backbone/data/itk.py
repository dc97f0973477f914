"""What ITK reads, such as MetaImage <-> array and affine, by SimpleITK."""

from __future__ import annotations

import logging
import re
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from sammed3d_backbone.data.limits import require_size
from sammed3d_backbone.files import inside, require_file

HEADER_BYTES = 2**16  # a MetaImage's header is shorter
PLACED = ("MetaImageIO", "NiftiImageIO", "MINCImageIO", "HDF5ImageIO")  # with directions of axes
logger = logging.getLogger(__name__)

CHUNK_BYTES = 2**16  # of compressed voxels, a thousand times as much unpacked at most
UNDERSTOOD = {  # fields of a MetaImage that ITK ignores or trusts, and what they may say
    "NDims": ("3",),
    "DistanceUnits": ("mm", "?"),
    "ElementToIntensityFunctionSlope": ("1", "1.0"),
    "ElementToIntensityFunctionOffset": ("0", "0.0"),
}
SIGNS = np.array([-1.0, -1.0, 1.0])  # ITK's world is left, posterior, superior


def read_itk(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Voxels and affine of a file; several numbers per voxel become channels.

    Shapes:
        returns: (X, Y, Z) or (C, X, Y, Z), and (4, 4), voxel -> RAS+ mm.

    Raises:
        ValueError: If ITK cannot read it, it is not 3-D, or it has no clear place in the body.
    """
    packed = _check_meta_image(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    kind = reader.GetImageIOFromFileName(str(path))
    try:
        reader.ReadImageInformation()
        if reader.GetDimension() != 3:
            raise ValueError(f"{path} has {reader.GetDimension()} dimensions; expected 3")
        try:
            require_size((*reader.GetSize(), reader.GetNumberOfComponents()), reader.GetSpacing())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        image = reader.Execute()
        array = sitk.GetArrayFromImage(image)
    except RuntimeError as error:
        lines = str(error).strip().splitlines()  # the last may be a stale "No such file"
        reason = next((line for line in lines if line.startswith("ITK ERROR")), lines[-1])
        raise ValueError(f"{path} cannot be read by ITK ({reason}); convert it to NIfTI") from None
    _require_whole(path, packed, array.nbytes)
    if array.dtype.kind == "c":
        raise ValueError(f"{path} holds complex numbers; save their magnitude")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing() * SIGNS[:, None]
    affine[:3, 3] = np.array(image.GetOrigin()) * SIGNS
    if kind not in PLACED:
        logger.warning(
            "%s: its format has no directions of axes (%s), so they are taken as left, posterior, "
            "superior at %s mm; check the sides of the result",
            path,
            kind,
            " x ".join(f"{mm:g}" for mm in image.GetSpacing()),
        )
    if kind == "NiftiImageIO":
        _require_stated_place(path, affine)
    array = array.astype(np.float32, copy=False)  # (Z, Y, X) or (Z, Y, X, C)
    return array.T, affine


def _check_meta_image(path: Path) -> list[tuple[Path, int]]:
    """Refuses a MetaImage that ITK would crash on, place or scale by a guess, or seek elsewhere.

    The voxels lie in the file or in regular files beside it. A number of dimensions other than ITK
    has room for ends the process; ITK takes a spacing that is left out as 1 mm, and leaves units
    and the rescaling of values out.

    Returns:
        The files with compressed voxels, and where those begin.
    """
    if path.suffix.lower() not in (".mha", ".mhd"):
        return []
    with path.open("rb") as file:
        content = file.read(HEADER_BYTES)
    head = content.decode("latin-1")  # a character per byte
    named = re.search(r"^[ \t]*ElementDataFile[ \t]*[=:][ \t]*(.*?)[ \t\r]*$", head, re.MULTILINE)
    header = head if named is None else head[: named.start()]
    fields: dict[str, str] = {}
    for name, value in re.findall(r"^\s*(\w+)\s*[=:][ \t]*(.*?)\s*$", header, re.MULTILINE):
        if fields.setdefault(name, value) != value:
            raise ValueError(f"{path} has {name[:40]} twice in its header; keep one")
    if fields and "ElementSpacing" not in fields:
        raise ValueError(f"{path} has no ElementSpacing, in mm; add it to its header")
    for name, allowed in UNDERSTOOD.items():
        if (value := fields.get(name, allowed[0])) not in allowed:
            raise ValueError(f"{path} has {name} = {value[:40]}; expected {allowed[0]}; convert it")
    names = [] if named is None or named[1].upper() == "LOCAL" else [named[1]]
    if named is not None and named[1].upper().startswith("LIST"):
        names = [line.strip() for line in head[named.end() :].splitlines() if line.strip()]
    beside = [inside(path.parent, name) for name in names]
    for other in beside:
        require_file(other)
    if named is None or not fields.get("CompressedData", "").upper().startswith("T"):
        return []
    return [(other, 0) for other in beside] or [(path, named.end() + 1)]


def _require_whole(path: Path, packed: list[tuple[Path, int]], needed: int) -> None:
    """Refuses damaged compressed voxels, in place of which ITK returns whatever memory held."""
    unpacked = 0
    for file_path, start in packed:
        with file_path.open("rb") as file:
            file.seek(start)
            stream = zlib.decompressobj(wbits=47)  # of zlib or gzip, as ITK's
            try:
                while not stream.eof and unpacked <= needed and (chunk := file.read(CHUNK_BYTES)):
                    unpacked += len(stream.decompress(chunk))
            except zlib.error:
                unpacked = -1
        if not stream.eof or unpacked < 0:
            raise ValueError(f"{path}: its compressed voxels are damaged; copy or convert it again")
    if packed and unpacked != needed:
        raise ValueError(
            f"{path}: its voxels unpack to {unpacked:,} bytes, and its header claims {needed:,}; "
            "copy or convert it again"
        )


def _require_stated_place(path: Path, affine: NDArray[np.float64]) -> None:
    """Refuses a NIfTI pair that ITK places elsewhere than its sform does, or an Analyze file.

    ITK may take the qform in place of a sheared sform; Analyze has no directions of axes at all.
    """
    try:
        stated = nib.load(path).affine  # type: ignore[attr-defined]
    except (ImageFileError, HeaderDataError, OSError, ValueError):
        stated = None
    if stated is None or not np.allclose(stated, affine, rtol=0, atol=1e-2):
        raise ValueError(
            f"{path}: ITK and nibabel place its voxels differently, as with sheared axes, two "
            "different forms, or Analyze; convert it to .nii.gz and check left and right"
        )


def write_itk(path: Path, array: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """Writes or replaces a file.

    Shapes:
        array: (X, Y, Z) or (C, X, Y, Z).
        affine: (4, 4), voxel -> RAS+ mm.

    Raises:
        ValueError: If the axes are not at right angles, which ITK cannot express.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    direction = affine[:3, :3] / spacing
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-4):
        raise ValueError("the axes are not at right angles; write .nii.gz or .nrrd")
    image = sitk.GetImageFromArray(array.T, isVector=array.ndim == 4)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((direction * SIGNS[:, None]).ravel().tolist())
    image.SetOrigin((affine[:3, 3] * SIGNS).tolist())
    sitk.WriteImage(image, str(path), useCompression=True)
