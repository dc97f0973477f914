"""One object's low-resolution logits in all its windows -> one field -> a mask on the own grid.

The network answers with one logit per *cell*, a cube of several voxels. Between the centres of the
cells of a window the answer is linear; where windows overlap, their answers are averaged with
weights that fall to the window's border, so that the field has no seams. It is evaluated straight
at the voxel centres of the volume's own grid and then compared with 0 (probability 0.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sammed3d_backbone.data.geometry import Triple
from sammed3d_backbone.inference.interactive.windows import Windows, linear

Axes = Sequence[NDArray[np.float64]]  # places along each of the three oriented axes
SLAB_VOXELS = 2**24  # evaluated at a time, which bounds the memory
LEAST_WEIGHT = 1e-3  # of a window at its border, where no other covers it


class Field:
    """Logits of an object, defined wherever one of its windows lies.

    Shapes:
        logits: start of a window -> (s, s, s), one logit per cell.
    """

    def __init__(self, windows: Windows, logits: Mapping[Triple, Tensor]) -> None:
        self.windows = windows
        self.logits = logits

    def at(self, places: Axes) -> tuple[Tensor, Tensor]:
        """The logits on a grid of places, and where they are known.

        Shapes:
            places: three ascending arrays of X, Y, Z places.
            returns: (X, Y, Z) float32 and bool; logits are 0 where there is no window.
        """
        weights = torch.zeros([len(axis) for axis in places])
        for start in self.logits:
            rows, (x, y, z) = self._weights(start, places)
            weights[rows] += x[:, None, None] * y[:, None] * z
        known = weights > 0
        return torch.where(known, self._weighted(places) / weights, 0), known

    def _weighted(self, places: Axes) -> Tensor:
        """The logits on a grid of places, times a positive number that varies: for their sign."""
        total = torch.zeros([len(axis) for axis in places])
        for start, logits in self.logits.items():
            rows, weights = self._weights(start, places)
            values = logits.float().cpu()
            for axis, (row, weight) in enumerate(zip(rows, weights, strict=True)):
                cell = self.windows.side_vox / logits.shape[axis]
                cells = (places[axis][row] - start[axis] + 0.5) / cell - 0.5
                # One matrix per axis and window: interpolation times weight.
                matrix = linear(torch.eye(logits.shape[axis]), 0, cells) * weight[:, None]
                values = torch.tensordot(values, matrix, dims=([0], [1]))  # the axis goes last
            total[rows] += values
        return total

    def mask(self) -> NDArray[np.bool_]:
        """Where the logit exceeds 0, on the volume's own grid, (X, Y, Z)."""
        # Memory that is never written costs nothing, however large the volume.
        mask = np.zeros(self.windows.geometry.input_shape, dtype=np.bool_)
        oriented = self.windows.geometry.oriented(mask)
        for slab, places in self._slabs(self._positive()):
            oriented[slab] = (self._weighted(places) > 0).numpy()
        return mask

    def probs(self) -> NDArray[np.float32]:
        """Probabilities on the volume's own grid, (X, Y, Z); 0 where there is no window."""
        probs = np.zeros(self.windows.geometry.input_shape, dtype=np.float32)
        oriented = self.windows.geometry.oriented(probs)
        for slab, places in self._slabs(self._covered()):
            logits, known = self.at(places)
            oriented[slab] = torch.where(known, logits.sigmoid(), 0).numpy()
        return probs

    def _weights(
        self, start: Triple, places: Axes
    ) -> tuple[tuple[slice, slice, slice], tuple[Tensor, Tensor, Tensor]]:
        """Which places of each axis lie in a window, and the window's weights there."""
        side = self.windows.side_vox
        rows, weights = [], []
        for first, along in zip(start, places, strict=True):
            low, high = np.searchsorted(along, [first - 0.5, first + side - 0.5])
            depth = along[low:high] - first + 0.5  # from the window's border, in voxels
            weight = torch.from_numpy(np.minimum(depth, side - depth) / (side / 2))
            rows.append(slice(int(low), int(high)))
            weights.append(weight.float().clamp_min(LEAST_WEIGHT))
        return (rows[0], rows[1], rows[2]), (weights[0], weights[1], weights[2])

    def _covered(self) -> list[tuple[float, float]]:
        """Per axis, the lowest and highest place in any window."""
        starts = np.array(list(self.logits))
        side = self.windows.side_vox
        lows, highs = starts.min(0) - 0.5, starts.max(0) + side - 0.5
        return list(zip(lows.tolist(), highs.tolist(), strict=True))

    def _positive(self) -> list[tuple[float, float]]:
        """Per axis, the places beyond which no window has a positive logit."""
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
        """The own grid's voxels between bounds, in slabs: their index and their places."""
        slices, places = [], []
        for axis, (low, high) in enumerate(bounds):
            own = self.windows.own_places(axis)
            first, last = np.searchsorted(own, [low, high])
            slices.append(slice(int(first), int(last)))
            places.append(own[first:last])
        rows = max(1, SLAB_VOXELS // max(1, len(places[1]) * len(places[2])))
        slabs: list[tuple[Any, Axes]] = []
        for first in range(slices[0].start, slices[0].stop, rows):
            slab = slice(first, min(first + rows, slices[0].stop))
            part = places[0][slab.start - slices[0].start : slab.stop - slices[0].start]
            slabs.append(((slab, slices[1], slices[2]), [part, *places[1:]]))
        return slabs
