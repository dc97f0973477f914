"""A 3-D image with its place in the body: file or DICOM series <-> array and affine.

Reads one image, writes one image, and refuses what cannot be placed or read. It does not reorient,
resample or normalise; that is `geometry` and `intensity`. `formats` chooses the reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from numpy.typing import NDArray

from sammed3d_backbone.data.formats import Header, read_voxels, require_writable, write_voxels
from sammed3d_backbone.data.limits import require_spacing
from sammed3d_backbone.data.nifti import nifti_image
from sammed3d_backbone.files import atomic_path


@dataclass(frozen=True, eq=False)
class Volume:
    """An image or label volume in the voxel order of its file.

    Shapes:
        array: (X, Y, Z), or (C, X, Y, Z) for several channels; float32 for images.
        affine: (4, 4) float64, voxel index -> world mm in RAS+, voxel centres at integer indices.
        header: What else the file or series says, for writing results that belong to it.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    header: Header = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.array.ndim not in (3, 4):
            raise ValueError(
                f"array of shape {self.array.shape} is not a volume; give (X, Y, Z) or (C, X, Y, Z)"
            )
        if 0 in self.array.shape:
            raise ValueError(f"array of shape {self.array.shape} has no voxels; give at least one")
        affine = np.asarray(self.affine)
        is_affine = affine.shape == (4, 4) and np.isfinite(affine).all()
        if not is_affine or not np.allclose(affine[3], (0, 0, 0, 1), atol=1e-6):
            raise ValueError(
                "the affine is not a finite 4 x 4 matrix ending in 0, 0, 0, 1; correct the header"
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
    def load(
        cls,
        path: str | Path,
        *,
        series: str | None = None,
        slice_tolerance_mm: float | None = None,
    ) -> Volume:
        """An image as float32, with the channels of a 4-D file first.

        Args:
            path: A file (.nii, .nii.gz, .nrrd, .mha, ...), or a file or folder of DICOM.
            series: UID of the DICOM series; needed where a folder holds several.
            slice_tolerance_mm: How far DICOM slices may lie from a regular grid; None for 1 % of
                their distance.

        Raises:
            FileNotFoundError: If there is no such file or folder.
            ValueError: If it is not a readable image with a usable affine.
        """
        path = Path(path)
        array, affine, header = read_voxels(path, series, slice_tolerance_mm)
        try:
            return cls(array, affine, header)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(
        self,
        path: str | Path,
        *,
        names: Mapping[int, str] | None = None,
        overwrite: bool = True,
    ) -> None:
        """Writes the volume; the file is complete or not there, whatever happens in between.

        A NIfTI header of the volume it came from keeps its codes and units; type, scaling and shape
        are those of the array. What it says in words, in its intent or in extensions is left out:
        it is about another image, and may name a person.

        Args:
            path: The ending chooses the format: .nii, .nii.gz, .nrrd, .mha, or .dcm for the labels
                of a DICOM series as DICOM-SEG.
            names: Names of the labels, for DICOM-SEG.
            overwrite: Whether to replace an existing file.

        Raises:
            FileExistsError: If the file exists and is not to be overwritten.
            ValueError: If the format is not known or cannot hold the volume.
        """
        path = Path(path)
        require_writable(path, self.header)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, overwrite=overwrite) as draft:
            try:
                write_voxels(draft, self.array, self.affine, self.header, names or {})
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None

    def to_nifti(self) -> Nifti1Image:
        """The volume as nibabel's image, with the header as `save` writes it."""
        header = self.header if isinstance(self.header, Nifti1Header) else None
        return nifti_image(self.array, self.affine, header)
