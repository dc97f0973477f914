"""What is wrong with a case once its files are open: sentences with the path and what to do."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.datasets import Case
from sammed3d_backbone.data.volume import Volume

AFFINE_TOLERANCE_MM = 1e-2  # origins written by different tools differ in the fourth decimal


def label_problems(path: Path, label: Volume, known: Collection[int]) -> list[str]:
    """What is wrong with an opened label file of which values are known."""
    values = values_of(label.array)
    if not np.isfinite(values).all() or (values != np.round(values)).any():
        return [f"{path}: labels are not whole numbers; save them as integers"]
    if label.array.ndim != 3:
        return [f"{path}: labels have {label.channels} channels; save one integer volume"]
    strange = sorted({int(value) for value in values} - set(known))
    if strange:
        return [f"{path}: values {strange} are not declared ({sorted(known)}); add or mend them"]
    return []


def class_problems(case: Case, classes: Collection[str]) -> list[str]:
    """What is wrong with which classes occur in a case's label.

    Voxels of a class that is not annotated are no problem: nobody vouches for them, nobody uses
    them. An annotated class without any would be taken for absent.

    Args:
        case: Whose label it is.
        classes: That have voxels, without background.
    """
    if not classes:
        return [f"{case.label}: holds background only; remove the case or label it"]
    if empty := sorted(set(case.annotated or ()) - set(classes)):
        return [f"{case.label}: {empty} are annotated, but have no voxel; take them out there"]
    return []


def pair_problems(path: Path, volume: Volume, other_path: Path, other: Volume) -> list[str]:
    """What keeps two volumes from lying on one grid."""
    if volume.shape != other.shape:
        return [f"{path}: shape {volume.shape}, but {other_path} has {other.shape}; resample one"]
    apart_mm = shift_mm(volume, other)
    if apart_mm > AFFINE_TOLERANCE_MM:
        return [f"{path}: lies up to {apart_mm:.3g} mm away from {other_path}; mend one affine"]
    return []


def shift_mm(volume: Volume, other: Volume) -> float:
    """How far the corners of two volumes of one shape lie apart at most, along a world axis."""
    return float(np.abs(_corners(volume) - _corners(other)).max())


def values_of(array: NDArray[Any]) -> NDArray[Any]:
    """The different values of a label volume, sorted; fast where neighbours are alike."""
    flat = array.ravel(order="K")  # as it lies in memory: NIfTI is read in Fortran's order
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return np.unique(flat[[0, *changes]])


def _corners(volume: Volume) -> np.ndarray[Any, np.dtype[np.float64]]:
    """World coordinates of the eight corner voxels, (8, 3)."""
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(volume.shape) - 1
    world: np.ndarray[Any, np.dtype[np.float64]] = (corners @ volume.affine.T)[:, :3]
    return world
