"""Problems of a case that show once its files are open, one line each with path and remedy."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from pathlib import Path

import nibabel as nib
import numpy as np

from sammed3d_backbone.data.limits import GRID_TOLERANCE
from sammed3d_backbone.data.regions import corner_voxels, values_of
from sammed3d_backbone.data.volume import Volume

logger = logging.getLogger(__name__)
_said: set[Path] = set()  # folders

NOTED_MM = 1e-2  # origins written by different tools differ in the fourth decimal


def label_problems(path: Path, label: Volume, known: Collection[int]) -> list[str]:
    """The problems of an opened label file with declared values."""
    values = values_of(label.array)
    if not np.isfinite(values).all() or (values != np.round(values)).any():
        return [f"{path}: labels are not whole numbers; save them as integers"]
    if label.array.ndim != 3:
        return [f"{path}: labels have {label.channels} channels; save one integer volume"]
    strange = sorted({int(value) for value in values} - set(known))
    if strange:
        return [f"{path}: values {strange} are not declared ({sorted(known)}); add or correct them"]
    return []


def pair_problems(
    path: Path,
    volume: Volume,
    other_path: Path,
    other: Volume,
    *,
    tolerance: float = GRID_TOLERANCE,
) -> list[str]:
    """What keeps two volumes from lying on one grid.

    Args:
        path: File of the volume.
        volume: The volume.
        other_path: File of the other one.
        other: The other one.
        tolerance: Distance that is taken as the same place, as a share of the smallest side of a
            voxel; it is said once for a folder.
    """
    apart_mm = shift_mm(volume, other) if volume.shape == other.shape else math.inf
    if apart_mm <= NOTED_MM:
        return []
    if apart_mm <= tolerance * min(other.spacing_mm):
        if path.parent not in _said:
            _said.add(path.parent)
            logger.warning(
                "%s and %s lie %.2g mm apart, a part of a voxel: taken as one place, also in other "
                "files of that folder",
                path,
                other_path,
                apart_mm,
            )
        return []
    axes, other_axes = ("".join(nib.aff2axcodes(v.affine)) for v in (volume, other))
    if axes != other_axes and sorted(volume.shape) == sorted(other.shape):
        return [
            f"{path}: axes run towards {axes}, those of {other_path} towards {other_axes}; both "
            "may be right, so keep the affines and store the voxels of one in the other's order "
            "(nibabel.as_closest_canonical does for both)"
        ]
    if volume.shape != other.shape:
        return [f"{path}: shape {volume.shape}, but {other_path} has {other.shape}; resample one"]
    return [
        f"{path}: lies up to {apart_mm:.3g} mm away from {other_path}, more than {tolerance:g} "
        "of a voxel; correct one affine"
    ]


def shift_mm(volume: Volume, other: Volume) -> float:
    """The largest distance between corners of two volumes of one shape, along a world axis."""
    corners = corner_voxels(volume.shape)
    return float(np.abs(corners @ volume.affine.T - corners @ other.affine.T).max())
