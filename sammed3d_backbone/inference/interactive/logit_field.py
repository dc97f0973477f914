"""One object's low-resolution logits in all its windows, as a field on the volume's own grid.

The network predicts one logit per *cell*, a cube of several voxels. Between the centres of a
window's cells the field is linear; where windows overlap, they are averaged with weights that
decrease towards the window's border, so the field has no seams. It is evaluated directly at the
voxel centres of the volume's own grid; the mask is where it exceeds 0 (probability 0.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sammed3d_backbone.data.geometry import Triple, interpolate_axis
from sammed3d_backbone.inference.interactive.windows import Windows

Axes = Sequence[NDArray[np.float64]]  # grid coordinates along each of the three oriented axes
SLAB_VOXELS = 2**24  # evaluated at a time, which bounds the memory
LEAST_WEIGHT = 1e-3  # weight of a window at its border, where no other window covers it


class LogitField:
    """Logits of an object, defined wherever one of its windows lies.

    Shapes:
        logits: start of a window -> (s, s, s), one logit per cell.
    """

    def __init__(self, windows: Windows, logits: Mapping[Triple, Tensor]) -> None:
        self.windows = windows
        self.logits = logits

    def at(self, points: Axes) -> tuple[Tensor, Tensor]:
        """The logits at a grid of points, and where they are known.

        Shapes:
            points: three ascending arrays of X, Y, Z grid coordinates.
            returns: (X, Y, Z) float32 and bool; logits are 0 where there is no window.
        """
        weights = torch.zeros([len(axis) for axis in points])
        for start in self.logits:
            rows, (x, y, z) = self._weights(start, points)
            weights[rows] += x[:, None, None] * y[:, None] * z
        known = weights > 0
        return torch.where(known, self._weighted(points) / weights, 0), known

    def _weighted(self, points: Axes) -> Tensor:
        """The logits at a grid of points, times a positive weight: enough for their sign."""
        total = torch.zeros([len(axis) for axis in points])
        for start, logits in self.logits.items():
            rows, weights = self._weights(start, points)
            values = logits.float().cpu()
            for axis, (row, weight) in enumerate(zip(rows, weights, strict=True)):
                cell = self.windows.side_vox / logits.shape[axis]
                cells = (points[axis][row] - start[axis] + 0.5) / cell - 0.5
                # One matrix per axis and window: interpolation times weight.
                matrix = interpolate_axis(torch.eye(logits.shape[axis]), 0, cells) * weight[:, None]
                with torch.autocast("cpu", enabled=False):  # the caller's mixes number formats
                    values = torch.tensordot(values, matrix, dims=([0], [1]))  # axis goes last
            total[rows] += values
        return total

    def mask(self) -> NDArray[np.bool_]:
        """Where the logit exceeds 0, on the volume's own grid, (X, Y, Z)."""
        # Memory that is never written costs nothing, however large the volume.
        mask = np.zeros(self.windows.geometry.input_shape, dtype=np.bool_)
        oriented = self.windows.geometry.oriented(mask)
        for slab, points in self._slabs(self._positive()):
            oriented[slab] = (self._weighted(points) > 0).numpy()
        return mask

    def probs(self) -> NDArray[np.float32]:
        """Probabilities on the volume's own grid, (X, Y, Z); 0 where there is no window."""
        probs = np.zeros(self.windows.geometry.input_shape, dtype=np.float32)
        oriented = self.windows.geometry.oriented(probs)
        for slab, points in self._slabs(self._covered()):
            logits, known = self.at(points)
            oriented[slab] = torch.where(known, logits.sigmoid(), 0).numpy()
        return probs

    def _weights(
        self, start: Triple, points: Axes
    ) -> tuple[tuple[slice, slice, slice], tuple[Tensor, Tensor, Tensor]]:
        """Which points along each axis lie in a window, and the window's weights there."""
        side = self.windows.side_vox
        rows, weights = [], []
        for first, along in zip(start, points, strict=True):
            low, high = np.searchsorted(along, [first - 0.5, first + side - 0.5])
            depth = along[low:high] - first + 0.5  # from the window's border, in voxels
            weight = torch.from_numpy(np.minimum(depth, side - depth) / (side / 2))
            rows.append(slice(int(low), int(high)))
            weights.append(weight.float().clamp_min(LEAST_WEIGHT))
        return (rows[0], rows[1], rows[2]), (weights[0], weights[1], weights[2])

    def _covered(self) -> list[tuple[float, float]]:
        """The lowest and highest grid coordinate in any window, per axis."""
        starts = np.array(list(self.logits))
        side = self.windows.side_vox
        lows, highs = starts.min(0) - 0.5, starts.max(0) + side - 0.5
        return list(zip(lows.tolist(), highs.tolist(), strict=True))

    def _positive(self) -> list[tuple[float, float]]:
        """The grid coordinates beyond which no window has a positive logit, per axis."""
        lows, highs = [], []
        for start, logits in self.logits.items():
            found = torch.nonzero(logits > 0).cpu().numpy()
            if len(found):
                cell = self.windows.side_vox / logits.shape[0]
                # A positive cell reaches as far as the centres of its neighbours.
                lows.append(np.array(start) + (found.min(0) - 0.5) * cell - 0.5)
                highs.append(np.array(start) + (found.max(0) + 1.5) * cell - 0.5)
        if not lows:
            return [(0.0, 0.0)] * 3
        return list(zip(np.min(lows, 0).tolist(), np.max(highs, 0).tolist(), strict=True))

    def _slabs(self, bounds: Sequence[tuple[float, float]]) -> list[tuple[Any, Axes]]:
        """The voxels of the own grid between bounds, in slabs: their index and grid coordinates."""
        slices, points = [], []
        for axis, (low, high) in enumerate(bounds):
            own = self.windows.grid_points(axis)
            first, last = np.searchsorted(own, [low, high])
            slices.append(slice(int(first), int(last)))
            points.append(own[first:last])
        rows = max(1, SLAB_VOXELS // max(1, len(points[1]) * len(points[2])))
        slabs: list[tuple[Any, Axes]] = []
        for first in range(slices[0].start, slices[0].stop, rows):
            slab = slice(first, min(first + rows, slices[0].stop))
            part = points[0][slab.start - slices[0].start : slab.stop - slices[0].start]
            slabs.append(((slab, slices[1], slices[2]), [part, *points[1:]]))
        return slabs
