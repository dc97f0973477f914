"""A 3-D image with its place in the body: NIfTI file <-> array and affine.

Reads one image, writes one image, and refuses what cannot be placed or read. It does not reorient,
resample or normalise; that is `geometry` and `intensity`.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from sammed3d_backbone.data.limits import require_spacing
from sammed3d_backbone.files import atomic_path

SUFFIXES = (".nii", ".nii.gz")
MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}  # of the header's xyzt_units
CHUNK_BYTES = 2**24
SPARE_BYTES = 2**24  # bytes behind the voxels that are tolerated
MAX_BYTES = 2**36


@dataclass(frozen=True, eq=False)
class Volume:
    """An image or label volume in the voxel order of its file.

    Shapes:
        array: (X, Y, Z), or (C, X, Y, Z) for several channels; float32 for images.
        affine: (4, 4) float64, voxel index -> world mm in RAS+, voxel centres at integer indices.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    header: nib.nifti1.Nifti1Header | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.array.ndim not in (3, 4):
            raise ValueError(
                f"array of shape {self.array.shape} is not a volume; give (X, Y, Z) or (C, X, Y, Z)"
            )
        if 0 in self.array.shape:
            raise ValueError(f"array of shape {self.array.shape} has no voxels; give at least one")
        affine = np.asarray(self.affine)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError(
                "the affine is not a finite 4 x 4 matrix; correct the header of the file"
            )
        if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise ValueError(
                "the affine is singular, so voxels have no place in the body; correct the header"
            )
        require_spacing(self.spacing_mm)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along X, Y, Z."""
        x, y, z = self.array.shape[-3:]
        return x, y, z

    @property
    def channels(self) -> int:
        """Number of channels, 1 for (X, Y, Z)."""
        return 1 if self.array.ndim == 3 else int(self.array.shape[0])

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along X, Y, Z."""
        x, y, z = (float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres, of sheared axes too."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    @classmethod
    def load(cls, path: str | Path) -> Volume:
        """An image as float32; a 4-D NIfTI has its channels last and comes back channels first.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a readable NIfTI image with a usable affine.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}; check the path")
        require_nifti_name(path)
        try:
            with path.open("rb") if path.suffix == ".nii" else gzip.open(path) as file:
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
        if array.ndim == 4:
            array = np.moveaxis(array, -1, 0)  # (C, X, Y, Z)
        header, affine = image.header.copy(), np.asarray(image.affine, dtype=np.float64)
        unit, of_time = header.get_xyzt_units()
        if unit in MM_PER_UNIT:
            affine[:3] *= MM_PER_UNIT[unit]
            header.set_xyzt_units("mm", of_time)
        try:
            return cls(array, affine, header)
        except ValueError as error:
            named = f" (its header gives {unit}s)" if unit in MM_PER_UNIT else ""
            raise ValueError(f"{path}: {error}{named}") from None

    def save(self, path: str | Path) -> None:
        """Writes the volume; the file is complete or not there, whatever happens in between.

        The header of the volume it came from keeps its codes and units; type, scaling and shape
        are those of the array.

        Raises:
            ValueError: If the name does not end in .nii or .nii.gz.
        """
        path = Path(path)
        require_nifti_name(path)
        image = self.to_nifti()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as draft:
            nib.save(image, draft)

    def to_nifti(self) -> nib.Nifti1Image:
        """The volume as nibabel's image, with the header as `save` writes it."""
        array = self.array if self.array.ndim == 3 else np.moveaxis(self.array, 0, -1)
        header = None
        if self.header is not None:
            header = self.header.copy()
            header.set_data_dtype(array.dtype)
            header.set_slope_inter(1, 0)
            header["cal_min"] = header["cal_max"] = 0
        is_second = isinstance(header, nib.Nifti2Header)
        kind: type[nib.Nifti1Image] = nib.Nifti2Image if is_second else nib.Nifti1Image
        return kind(array, self.affine, header)


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


def _read(path: Path, file: IO[bytes] | gzip.GzipFile) -> bytes:
    """The bytes of a NIfTI file, unpacked only as far as its header says that there are voxels.

    A single file begins with at least 352 (NIfTI-2: 544) bytes of header. Writers that leave
    vox_offset at 0 mean that place; read literally, the header would become voxels.
    """
    content = bytearray(file.read(544))
    is_second = content[4:7] == b"n+2"
    kind = nib.Nifti2Header if is_second else nib.Nifti1Header
    first = 544 if is_second else 352
    # Four zeros in place of extensions, which may be longer than what was read.
    header = kind.from_fileobj(io.BytesIO(content[: first - 4] + bytes(4)))
    given = float(header["vox_offset"])
    if not given >= first:
        if any(content[first - 4 : first - 3]):
            raise ValueError(f"{path} has vox_offset {given:g} and extensions; convert it again")
        place, form = (168, "q") if is_second else (108, "f")
        struct.pack_into(f"{header.endianness}{form}", content, place, first)
        given = first
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


def require_nifti_name(path: Path) -> None:
    """Refuses a path that another tool would not take for NIfTI.

    Raises:
        ValueError: If it does not end in .nii or .nii.gz.
    """
    if not path.name.endswith(SUFFIXES):
        raise ValueError(
            f"{path} is not named .nii or .nii.gz; choose such a name, or convert it to NIfTI"
        )
