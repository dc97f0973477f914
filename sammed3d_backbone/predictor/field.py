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
from sammed3d_backbone.predictor.windows import Windows, linear

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
        """The weighted sum of the windows' logits on a grid of places, and the sum of the weights.

        Shapes:
            places: three ascending arrays of X, Y, Z places.
            returns: twice (X, Y, Z); both 0 where there is no window.
        """
        total = torch.zeros([len(axis) for axis in places])
        weights = torch.zeros_like(total)
        for start, logits in self.logits.items():
            rows, pulls = [], []
            for axis, along in enumerate(places):
                row, pull = self._along(start[axis], along)
                rows.append(row)
                pulls.append(pull)
            if any(row.start == row.stop for row in rows):
                continue
            values = logits.float().cpu()
            for axis, (row, pull) in enumerate(zip(rows, pulls, strict=True)):
                cell = self.windows.side_vox / logits.shape[axis]
                cells = (places[axis][row] - start[axis] + 0.5) / cell - 0.5
                # One matrix per axis and window: interpolation times weight.
                matrix = linear(torch.eye(logits.shape[axis]), 0, cells) * pull[:, None]
                values = torch.tensordot(values, matrix, dims=([0], [1]))  # the axis goes last
            part = (rows[0], rows[1], rows[2])
            total[part] += values
            weights[part] += pulls[0][:, None, None] * pulls[1][:, None] * pulls[2]
        return total, weights

    def mask(self) -> NDArray[np.bool_]:
        """Where the logit exceeds 0, on the volume's own grid, (X, Y, Z)."""
        # Memory that is never written costs nothing, however large the volume.
        mask = np.zeros(self.windows.geometry.input_shape, dtype=np.bool_)
        oriented = self.windows.geometry.oriented(mask)
        for slab, places in self._slabs(self._positive()):
            oriented[slab] = (self.at(places)[0] > 0).numpy()
        return mask

    def probs(self) -> NDArray[np.float32]:
        """Probabilities on the volume's own grid, (X, Y, Z); 0 where there is no window."""
        probs = np.zeros(self.windows.geometry.input_shape, dtype=np.float32)
        oriented = self.windows.geometry.oriented(probs)
        for slab, places in self._slabs(self._covered()):
            total, weights = self.at(places)
            oriented[slab] = torch.where(weights > 0, (total / weights).sigmoid(), 0).numpy()
        return probs

    def _along(self, start: int, places: NDArray[np.float64]) -> tuple[slice, Tensor]:
        """Which places of an axis lie in a window, and the window's weights there."""
        side = self.windows.side_vox
        low, high = np.searchsorted(places, [start - 0.5, start + side - 0.5])
        depth = places[low:high] - start + 0.5  # from the window's border, in voxels
        pull = np.minimum(depth, side - depth) / (side / 2)
        return slice(int(low), int(high)), torch.from_numpy(pull).float().clamp_min(LEAST_WEIGHT)

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
