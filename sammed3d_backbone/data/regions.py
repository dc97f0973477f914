"""Regions of voxels: corners, bounding boxes, connected components, depth, values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

Mask: TypeAlias = NDArray[np.bool_]  # (X, Y, Z)
AT_ONCE = 2**24  # voxels


def corner_voxels(shape: Sequence[int], margin: float = 0.0) -> NDArray[np.float64]:
    """The eight corner voxels as homogeneous coordinates, (8, 4), moved outwards by a margin."""
    ends = ((-margin, n - 1 + margin) for n in shape)
    return np.array([[*corner, 1] for corner in itertools.product(*ends)], dtype=np.float64)


def values_of(array: NDArray[Any]) -> NDArray[Any]:
    """The different values of a label volume, sorted; fast where neighbours are alike."""
    flat = array.ravel(order="K")  # in the order of memory: NIfTI is read in Fortran's order
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return np.unique(flat[[0, *changes]])


def bounding_box(mask: Mask) -> tuple[slice, ...] | None:
    """The smallest box around the voxels of a mask; None if it has none."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        found = np.flatnonzero(mask.any(axis=others))
        if not len(found):
            return None
        side = slice(int(found[0]), int(found[-1]) + 1)
        mask = mask[(slice(None),) * axis + (side,)]  # the rest is empty
        box.append(side)
    return tuple(box)


def components(mask: Mask) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The 26-connected components of a mask, numbered from 1, and the voxels of each.

    Shapes:
        mask: (X, Y, Z).
        returns: (X, Y, Z) integers, 0 outside the mask, and (components,).
    """
    labels, number = ndimage.label(mask, structure=np.ones((3, 3, 3)))  # corners connect
    sizes = np.zeros(1 + number, np.int64)
    flat = labels.ravel()
    for first in range(0, flat.size, AT_ONCE):  # bincount makes eight bytes of each
        sizes += np.bincount(flat[first : first + AT_ONCE], minlength=1 + number)
    return labels, sizes[1:]


def keep_largest_component(labels: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """The labels with each class reduced to its largest component, by 26-connectivity.

    Shapes:
        labels: (X, Y, Z), 0 is background.
        returns: (X, Y, Z) of the same type.
    """
    kept = np.zeros_like(labels)
    for value, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            parts, sizes = components(labels[box] == value)
            kept[box][parts == 1 + sizes.argmax()] = value
    return kept


def depth_mm(mask: Mask, spacing_mm: ArrayLike) -> NDArray[np.float64]:
    """Distance of every voxel of a mask to the nearest voxel outside it, 0 outside.

    What lies beyond the array counts as outside.

    Shapes:
        mask: (X, Y, Z).
        returns: (X, Y, Z).
    """
    depth = np.zeros(mask.shape)
    box = bounding_box(mask)
    if box is not None:
        inside = (slice(1, -1),) * mask.ndim
        padded = np.pad(mask[box], 1)
        depth[box] = ndimage.distance_transform_edt(padded, sampling=spacing_mm)[inside]
    return depth
