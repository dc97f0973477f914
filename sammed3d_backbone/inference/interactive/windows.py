"""Windows of one volume: where they may lie, what the network sees in them, the way back.

Three coordinate systems: *voxels* of the volume's own grid; *grid points* of the resampled grid
(axes towards R, A, S, the network's spacing, voxel centres at whole numbers); and voxels of one
window. A window is a cube of the resampled grid and is named by its first voxel, its *start*. All
windows of a session lie on one lattice with half a window between neighbours, so prompts about many
objects share windows.

Only what lies in a window is resampled. Where the weights need the statistics of the whole volume,
these are measured once over the resampled volume in slabs: float64 sums, equal to those of the
whole volume up to rounding, with the memory of one slab.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sammed3d_backbone.data.geometry import Geometry, Triple
from sammed3d_backbone.data.intensity import IntensityScale, measure_scale
from sammed3d_backbone.data.preprocessing import Modality, Preprocessing
from sammed3d_backbone.data.volume import Volume

GridPoint = tuple[float, float, float]
SLAB_PLANES = 16  # planes of the resampled volume that are measured at a time


class Windows:
    """Windows of one volume.

    Args:
        volume: Has one channel.
        preprocessing: Expected by the network; the side S of a window is its `crop_vox`.
        modality: Chooses the intensity mode.

    Shapes:
        start: first voxel of a window in the resampled grid; negative where the window begins in
            padding.

    Raises:
        ValueError: If the network does not know the modality.
    """

    def __init__(
        self, volume: Volume, preprocessing: Preprocessing, modality: Modality | None = None
    ) -> None:
        self.geometry = Geometry.plan(volume.shape, volume.affine, preprocessing.spacing_mm)
        self.side_vox = preprocessing.crop_vox[0]
        self._preprocessing = preprocessing
        self._modality = modality
        self._intensity = preprocessing.intensity_mode(modality)
        self._array = volume.array
        self._shape = self.geometry.oriented(volume.array).shape

    def grid_point(self, point_vox: Triple) -> GridPoint:
        """The grid point of a voxel of the volume's own grid."""
        shape, resampled = self._shape, self.geometry.resampled_shape
        x, y, z = (
            (index + 0.5) * m / n - 0.5
            for index, n, m in zip(
                self.geometry.oriented_voxel(point_vox), shape, resampled, strict=True
            )
        )
        return x, y, z

    def grid_points(self, axis: int) -> NDArray[np.float64]:
        """Grid coordinates of the volume's own voxels along an oriented axis."""
        n, m = self._shape[axis], self.geometry.resampled_shape[axis]
        points: NDArray[np.float64] = (np.arange(n) + 0.5) * (m / n) - 0.5
        return points

    def around(self, point: GridPoint, anchor: Triple | None) -> Triple:
        """Start of the window whose middle half contains a grid point.

        Args:
            point: Inside the volume.
            anchor: Start of any window of the lattice; None begins a lattice with a window centred
                on the point, as crops were in training.
        """
        half = self.side_vox // 2
        start = []
        for axis, p in enumerate(point):
            room = self.geometry.resampled_shape[axis] - self.side_vox
            if room <= 0:  # one window holds it all, with the volume in its middle
                start.append(-(-room // 2))
            elif anchor is None:
                start.append(int(np.floor(p + 0.5)) - half)
            else:
                middle = anchor[axis] + (self.side_vox - 1) / 2
                start.append(anchor[axis] + half * int(np.floor((p - middle) / half + 0.5)))
        return start[0], start[1], start[2]

    def beside(self, start: Triple, axis: int, step: int) -> Triple | None:
        """Start of the next window along an axis, +1 or -1; None if the volume ends before it."""
        border = start[axis] if step < 0 else start[axis] + self.side_vox
        if not 0 < border < self.geometry.resampled_shape[axis]:
            return None
        moved = list(start)
        moved[axis] += step * (self.side_vox // 2)
        return moved[0], moved[1], moved[2]

    def inside(self, start: Triple, point: GridPoint) -> Triple | None:
        """The window's voxel nearest to a grid point; None if it lies outside the window."""
        index = [
            min(max(int(np.floor(p + 0.5)), 0), n - 1) - s
            for p, n, s in zip(point, self.geometry.resampled_shape, start, strict=True)
        ]
        if not all(0 <= i < self.side_vox for i in index):
            return None
        return index[0], index[1], index[2]

    def cell_points(self, start: Triple, cells: int) -> list[NDArray[Any]]:
        """Grid coordinates of the centres of a window's cells, `cells` per side, for each axis."""
        cell = self.side_vox / cells
        return [s + (np.arange(cells, dtype=np.float64) + 0.5) * cell - 0.5 for s in start]

    def cells_inside(self, start: Triple, cells: int) -> NDArray[np.bool_]:
        """Which of a window's cells have their centre in the volume, (cells, cells, cells)."""
        x, y, z = (
            (points >= -0.5) & (points < n - 0.5)
            for points, n in zip(
                self.cell_points(start, cells), self.geometry.resampled_shape, strict=True
            )
        )
        inside: NDArray[np.bool_] = x[:, None, None] & y[:, None] & z
        return inside

    def image(self, start: Triple) -> Tensor:
        """The network's input in a window: resampled, padded with raw zeros, normalised.

        Shapes:
            returns: (1, 1, S, S, S) float32.
        """
        side = self.side_vox
        window = self.geometry.resample_box(self._array, start, (side, side, side))[None, None]
        if self._preprocessing.statistics == "volume":
            window = self._scale.apply(window)
        return self._preprocessing.crops(window, self._modality)

    @cached_property
    def _scale(self) -> IntensityScale:
        """The intensity scale of the whole resampled volume."""

        def slabs() -> Iterator[Tensor]:
            x, y, z = self.geometry.resampled_shape
            for first in range(0, x, SLAB_PLANES):
                planes = min(SLAB_PLANES, x - first)
                yield self.geometry.resample_box(self._array, (first, 0, 0), (planes, y, z))

        return measure_scale(slabs, self._intensity)
