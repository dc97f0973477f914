"""What ITK reads, such as MetaImage <-> array and affine, by SimpleITK."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from sammed3d_backbone.data.limits import require_size
from sammed3d_backbone.files import inside, require_file

HEADER_BYTES = 2**16  # a MetaImage's header is shorter
SIGNS = np.array([-1.0, -1.0, 1.0])  # ITK's world is left, posterior, superior


def read_itk(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Voxels and affine of a file; several numbers per voxel become channels.

    Shapes:
        returns: (X, Y, Z) or (C, X, Y, Z), and (4, 4), voxel -> RAS+ mm.

    Raises:
        ValueError: If ITK cannot read it, or it is not 3-D.
    """
    _require_data_files(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        if reader.GetDimension() != 3:
            raise ValueError(f"{path} has {reader.GetDimension()} dimensions; expected 3")
        require_size((*reader.GetSize(), reader.GetNumberOfComponents()), reader.GetSpacing())
        image = reader.Execute()
        array = sitk.GetArrayFromImage(image)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{path} cannot be read by ITK ({reason}); convert it to NIfTI") from None
    if array.dtype.kind == "c":
        raise ValueError(f"{path} holds complex numbers; save their magnitude")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing() * SIGNS[:, None]
    affine[:3, 3] = np.array(image.GetOrigin()) * SIGNS
    array = array.astype(np.float32, copy=False)  # (Z, Y, X) or (Z, Y, X, C)
    return array.T, affine


def _require_data_files(path: Path) -> None:
    """Refuses a MetaImage whose voxels lie elsewhere than in regular files beside its header."""
    if path.suffix not in (".mha", ".mhd"):
        return
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES).decode(errors="replace")
    named = re.search(r"^\s*ElementDataFile\s*=\s*(.*?)\s*$", head, re.MULTILINE)
    names = [] if named is None or named[1].upper() == "LOCAL" else [named[1]]
    if named is not None and named[1].upper().startswith("LIST"):
        names = [line.strip() for line in head[named.end() :].splitlines() if line.strip()]
    for name in names:
        require_file(inside(path.parent, name))


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
