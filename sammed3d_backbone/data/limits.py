"""Limits of what counts as a scan: spacing, values and size, the same for every command.

Headers are data from elsewhere. What they claim is held against these limits before memory is
asked for: `Volume` holds its spacing against them, `Geometry.plan` its size, and
`Preprocessing.image` its values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPACING_MM = (0.01, 100.0)
# Share of a voxel by which volumes on one grid may lie apart. ITK makes axes orthonormal, which
# moves the corners of slightly sheared volumes by tenths of a millimetre.
GRID_TOLERANCE = 0.25
MAX_VOXELS = 2**29  # of a resampled channel, 2 GiB as float32; prediction holds several such grids
MAX_UNPACKED = 2**34


def require_spacing(spacing_mm: Sequence[float]) -> None:
    """Checks that a spacing can be that of a scan.

    Raises:
        ValueError: If it cannot.
    """
    low, high = SPACING_MM
    if not all(low <= mm <= high for mm in spacing_mm):
        raise ValueError(
            f"implausible spacing {tuple(round(float(s), 6) for s in spacing_mm)} mm, expected "
            f"{low:g} to {high:g}: the header may use metres or micrometres; correct its affine"
        )


def require_size(shape: Sequence[int], spacing_mm: Sequence[float]) -> None:
    """Checks that a grid is small enough to be computed.

    Raises:
        ValueError: If it has more than `MAX_VOXELS` voxels.
    """
    if (voxels := math.prod(shape)) > MAX_VOXELS:
        raise ValueError(
            f"the volume would have {' x '.join(map(str, shape))} voxels at "
            f"{tuple(round(float(s), 4) for s in spacing_mm)} mm, {voxels * 4 / 2**30:,.0f} GiB "
            f"per channel, and {MAX_VOXELS * 4 // 2**30} GiB are allowed; check the spacing in its "
            "header, crop it, or use a coarser spacing"
        )


def require_bytes(unpacked: int) -> None:
    """Checks that a compressed file is small enough to be unpacked.

    Raises:
        ValueError: If it would take more than `MAX_UNPACKED` bytes.
    """
    if unpacked > MAX_UNPACKED:
        raise ValueError(
            f"it would unpack to {unpacked / 2**30:,.0f} GiB, and {MAX_UNPACKED // 2**30} GiB are "
            "allowed; store fewer voxels per file"
        )


def value_range(array: NDArray[Any]) -> tuple[float, float]:
    """The lowest and the highest value of an image.

    Raises:
        ValueError: If a value is not finite, also as float32, or all are alike.
    """
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        count = array.size - int(np.isfinite(array).sum())
        raise ValueError(f"{count} non-finite voxels (NaN or infinity); replace those voxels")
    if max(abs(low), abs(high)) > float(np.finfo(np.float32).max):
        raise ValueError(f"values from {low:g} to {high:g} are beyond float32; rescale them")
    if low == high:
        raise ValueError(f"all voxels have the value {low:g}; check the file")
    return low, high
