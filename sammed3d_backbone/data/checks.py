"""Problems of a case that show once its files are open, one line each with path and remedy."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sammed3d_backbone.data.datasets import Case
from sammed3d_backbone.data.regions import corner_voxels
from sammed3d_backbone.data.volume import Volume

AFFINE_TOLERANCE_MM = 1e-2  # origins written by different tools differ in the fourth decimal


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


def class_problems(case: Case, classes: Collection[str]) -> list[str]:
    """The problems of the classes that occur in a case's label.

    Voxels of a class that is not annotated are allowed, since they are not used. An annotated
    class without voxels would be taken for absent.
    """
    if not classes:
        return [f"{case.label}: holds background only; remove the case or label it"]
    if empty := sorted(set(case.annotated or ()) - set(classes)):
        return [f"{case.label}: {empty} are annotated but have no voxel; remove them there"]
    return []


def pair_problems(path: Path, volume: Volume, other_path: Path, other: Volume) -> list[str]:
    """The differences between the grids of two volumes."""
    if volume.shape != other.shape:
        return [f"{path}: shape {volume.shape}, but {other_path} has {other.shape}; resample one"]
    apart_mm = shift_mm(volume, other)
    if apart_mm > AFFINE_TOLERANCE_MM:
        return [f"{path}: lies up to {apart_mm:.3g} mm away from {other_path}; correct one affine"]
    return []


def shift_mm(volume: Volume, other: Volume) -> float:
    """The largest distance between corners of two volumes of one shape, along a world axis."""
    corners = corner_voxels(volume.shape)
    return float(np.abs(corners @ volume.affine.T - corners @ other.affine.T).max())


def values_of(array: NDArray[Any]) -> NDArray[Any]:
    """The different values of a label volume, sorted; fast where neighbours are alike."""
    flat = array.ravel(order="K")  # in the order of memory: NIfTI is read in Fortran's order
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return np.unique(flat[[0, *changes]])
