"""Which reader and writer a path gets: NIfTI, NRRD, DICOM, and what ITK knows."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Header
from numpy.typing import NDArray

from sammed3d_backbone.data.dicom import DicomSeries, is_dicom, read_dicom
from sammed3d_backbone.data.dicom_seg import write_dicom_seg
from sammed3d_backbone.data.nifti import SUFFIXES, nifti_image, read_nifti
from sammed3d_backbone.files import require_file

Header = Nifti1Header | DicomSeries | None  # what a file says beside its voxels and affine

NRRD_SUFFIXES = (".nrrd", ".nhdr")
# The package that writes a format, and the extra that installs it.
WRITERS = {
    **dict.fromkeys(SUFFIXES, ("nibabel", "")),
    ".nrrd": ("nrrd", "nrrd"),
    ".mha": ("SimpleITK", "itk"),
    ".dcm": ("highdicom", "dicom"),
}


def read_voxels(
    path: Path, series: str | None = None, slice_tolerance_mm: float | None = None
) -> tuple[NDArray[Any], NDArray[np.float64], Header]:
    """Voxels, affine and header of a file, or of a DICOM series in a folder.

    Args:
        path: A file, or a folder of DICOM.
        series: For DICOM; see `read_dicom`.
        slice_tolerance_mm: For DICOM; see `read_dicom`.

    Shapes:
        returns: (X, Y, Z) or (C, X, Y, Z), and (4, 4), voxel -> RAS+ mm.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file or folder at {path}; check the path")
    if not path.is_dir():
        require_file(path)
    is_nifti = path.name.lower().endswith(SUFFIXES)  # ITK may place A.NII.GZ otherwise
    if path.is_dir() or (not is_nifti and is_dicom(path)):
        _require("highdicom", "dicom", f"{path} is DICOM, which")
        return read_dicom(path, series, slice_tolerance_mm)
    if series is not None or slice_tolerance_mm is not None:
        raise ValueError(f"{path} is not DICOM; leave out series and slice_tolerance_mm")
    if is_nifti:
        return read_nifti(path)
    if path.suffix.lower() in NRRD_SUFFIXES:
        _require("nrrd", "nrrd", f"{path} is NRRD, which")
        from sammed3d_backbone.data.nrrd import read_nrrd

        return *read_nrrd(path), None
    _require("SimpleITK", "itk", f"{path} is neither NIfTI, NRRD nor DICOM, and another format")
    from sammed3d_backbone.data.itk import read_itk

    return *read_itk(path), None


def write_voxels(
    path: Path,
    array: NDArray[Any],
    affine: NDArray[np.float64],
    header: Header,
    names: Mapping[int, str],
) -> None:
    """Writes or replaces a file that `require_writable` allows.

    Shapes:
        array: (X, Y, Z) or (C, X, Y, Z).
        affine: (4, 4), voxel -> RAS+ mm.
    """
    if path.suffix == ".dcm" and isinstance(header, DicomSeries):
        write_dicom_seg(path, array, affine, header, names)
    elif path.suffix == ".nrrd":
        from sammed3d_backbone.data.nrrd import write_nrrd

        write_nrrd(path, array, affine)
    elif path.suffix == ".mha":
        from sammed3d_backbone.data.itk import write_itk

        write_itk(path, array, affine)
    else:
        own = header if isinstance(header, Nifti1Header) else None
        nib.save(nifti_image(array, affine, own), path)


def require_writable(path: Path, header: Header) -> None:
    """Refuses an output before any work.

    Args:
        path: Its ending is the format.
        header: Header of the image that the output belongs to.

    Raises:
        ValueError: If the format is not known, needs a package that is not installed, or is
            DICOM-SEG without a DICOM series that it can belong to.
    """
    suffix = next((suffix for suffix in WRITERS if path.name.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(
            f"{path} is not a name that can be written; choose one that ends in "
            f"{', '.join(WRITERS)}"
        )
    _require(*WRITERS[suffix], f"{path} is {suffix}, which")
    if suffix != ".dcm":
        return
    fault = ""
    if not isinstance(header, DicomSeries):
        fault = "the scan was not read from one"
    elif not header.frame_of_reference:
        fault = "that of the scan has no Frame of Reference UID"
    if fault:
        raise ValueError(
            f"{path}: a DICOM-SEG belongs to a DICOM series, and {fault}; "
            f"write {path.with_suffix('.nii.gz')}"
        )


def _require(module: str, extra: str, what: str) -> None:
    """Says how to install what is not there."""
    if find_spec(module) is None:
        raise ValueError(f"{what} needs {module}; pip install 'sammed3d-backbone[{extra}]'")
