"""The windows of one volume: where they may lie, what the network sees in them, the way back.

A *place* is a position in the volume's resampled grid: axes towards R, A, S, the network's
spacing, voxel centres at whole numbers. A window is a cube of that grid and is named by its first
voxel, its *start*. All windows of a session lie on one lattice with half a window between
neighbours, so clicks of many objects meet in the same few.

The volume stays as it is: only what lies in a window is ever resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sammed3d_backbone.data.geometry import Geometry, Triple, TripleMm
from sammed3d_backbone.data.intensity import normalise
from sammed3d_backbone.data.volume import Volume

Place = tuple[float, float, float]


class Windows:
    """Windows of one volume.

    Args:
        volume: One channel.
        spacing_mm: Along R, A, S, that the network was trained with.
        side_vox: Side S of a window in voxels, the network's input size.
        intensity: A mode of `data.intensity.normalise`.

    Shapes:
        start: first voxel of a window in the resampled grid; negative where the window begins
            outside the volume, in padding.
    """

    def __init__(self, volume: Volume, spacing_mm: TripleMm, side_vox: int, intensity: str) -> None:
        self.geometry = Geometry.plan(volume.shape, volume.affine, spacing_mm)
        self.side_vox = side_vox
        self.intensity = intensity
        self._array = self.geometry.oriented(volume.array)

    def place(self, point_vox: Triple) -> Place:
        """The place of a voxel of the volume's own grid."""
        shape, resampled = self._array.shape, self.geometry.resampled_shape
        x, y, z = (
            (index + 0.5) * m / n - 0.5
            for index, n, m in zip(
                self.geometry.oriented_voxel(point_vox), shape, resampled, strict=True
            )
        )
        return x, y, z

    def own_places(self, axis: int) -> NDArray[np.float64]:
        """Places of the volume's own voxels along an oriented axis."""
        n, m = self._array.shape[axis], self.geometry.resampled_shape[axis]
        places: NDArray[np.float64] = (np.arange(n) + 0.5) * (m / n) - 0.5
        return places

    def around(self, place: Place, anchor: Triple | None) -> Triple:
        """Start of the window in whose middle half a place lies.

        Args:
            place: Inside the volume.
            anchor: Start of any window of the lattice; None begins a lattice with a window that is
                centred on the place, as training's were on their objects.
        """
        half = self.side_vox // 2
        start = []
        for axis, p in enumerate(place):
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
        """Start of the next window along an axis, +1 or -1; None if the volume ends before."""
        border = start[axis] if step < 0 else start[axis] + self.side_vox
        if not 0 < border < self.geometry.resampled_shape[axis]:
            return None
        moved = list(start)
        moved[axis] += step * (self.side_vox // 2)
        return moved[0], moved[1], moved[2]

    def inside(self, start: Triple, place: Place) -> Triple | None:
        """The window's voxel nearest to a place; None if the place lies outside the window."""
        index = [
            min(max(int(np.floor(p + 0.5)), 0), n - 1) - s
            for p, n, s in zip(place, self.geometry.resampled_shape, start, strict=True)
        ]
        if not all(0 <= i < self.side_vox for i in index):
            return None
        return index[0], index[1], index[2]

    def cells_inside(self, start: Triple, cells: int) -> NDArray[np.bool_]:
        """Which of a window's cells, so many a side, have their centre in the volume."""
        cell = self.side_vox / cells
        x, y, z = (
            (places >= -0.5) & (places < n - 0.5)
            for s, n in zip(start, self.geometry.resampled_shape, strict=True)
            for places in [s + (np.arange(cells) + 0.5) * cell - 0.5]
        )
        inside: NDArray[np.bool_] = x[:, None, None] & y[:, None] & z
        return inside

    def image(self, start: Triple) -> Tensor:
        """What the network sees: resampled, padded with zeros, normalised by the window's voxels.

        Shapes:
            returns: (1, 1, S, S, S) float32.
        """
        return normalise(self.resampled(self._array, start)[None], self.intensity).image[None]

    def resampled(self, oriented: NDArray[Any], start: Triple) -> Tensor:
        """A window of an array, resampled linearly; zeros outside the volume.

        Shapes:
            oriented: (X, Y, Z), the volume's own voxels with axes towards R, A, S.
            returns: (S, S, S) float32.
        """
        positions, padding, region = [], [], []
        for axis, first in enumerate(start):
            n, m = oriented.shape[axis], self.geometry.resampled_shape[axis]
            low, high = max(first, 0), min(first + self.side_vox, m)
            own = (np.arange(low, high) + 0.5) * (n / m) - 0.5
            lower, upper = max(int(own[0]), 0), min(int(own[-1]) + 2, n)
            positions.append(own - lower)
            padding.append((low - first, first + self.side_vox - high))
            region.append(slice(lower, upper))
        x = torch.from_numpy(np.ascontiguousarray(oriented[tuple(region)], dtype=np.float32))
        # What shrinks most goes first, what grows most last. Of equal axes the third, along which
        # values are slow to gather, goes where there are fewest of them.
        growth = [len(own) / n for own, n in zip(positions, x.shape, strict=True)]
        for axis in sorted(range(3), key=lambda a: (growth[a], a if growth[a] < 1 else -a)):
            x = linear(x, axis, positions[axis])
        return F.pad(x, [p for pair in reversed(padding) for p in pair])


def linear(x: Tensor, axis: int, positions: NDArray[np.float64] | Sequence[float]) -> Tensor:
    """Values along an axis at continuous indices, linear between them, constant beyond the ends.

    Shapes:
        x: (..., n, ...), n along the axis.
        positions: (m,).
        returns: (..., m, ...).
    """
    at = torch.as_tensor(positions, dtype=torch.float64).clamp(0, x.shape[axis] - 1)
    lower = at.floor().long()
    upper = (lower + 1).clamp_max(x.shape[axis] - 1)
    share = (at - lower).to(x.dtype).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    if not share.any():
        return x.index_select(axis, lower)
    return torch.lerp(x.index_select(axis, lower), x.index_select(axis, upper), share)
